"""Pages that show what came of runs and studies, each one file."""

from jaxformers.pages.page import save
from jaxformers.pages.recorded import RecordedRun
from jaxformers.pages.recorded import recorded_runs
from jaxformers.pages.runs import runs_page
from jaxformers.pages.studies import RecordedStudy
from jaxformers.pages.studies import studies_page
