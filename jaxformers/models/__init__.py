"""Models assembled from the parts in `jaxformers.nn`."""

from jaxformers.models.closed_form import ClosedFormClassifier
from jaxformers.models.language_model import LanguageModel
from jaxformers.models.language_model import LanguageModelState
