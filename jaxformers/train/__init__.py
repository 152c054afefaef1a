"""Training: experiments, the loop, and runs to come back to."""

from jaxformers.train.baseline import NGram
from jaxformers.train.experiment import Experiment
from jaxformers.train.experiment import Preview
from jaxformers.train.experiment import Start
from jaxformers.train.gradient import GradientFunction
from jaxformers.train.last_tokens import LastTokens
from jaxformers.train.last_tokens import evaluate_last_tokens
from jaxformers.train.loop import train
from jaxformers.train.objective import Losses
from jaxformers.train.objective import NextToken
from jaxformers.train.objective import Objective
from jaxformers.train.report import Report
from jaxformers.train.report import read_report
from jaxformers.train.reproduction import reproduce
from jaxformers.train.run import FromRun
from jaxformers.train.run import Run
from jaxformers.train.run import open_run
from jaxformers.train.sharding import MeshShape
from jaxformers.train.state import TrainState
from jaxformers.train.study import Judgement
from jaxformers.train.study import Results
from jaxformers.train.study import Study
from jaxformers.train.study import above
from jaxformers.train.study import below
from jaxformers.train.workspace import Workspace
