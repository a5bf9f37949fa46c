"""Training adapters: their parameters, penalties as loss terms, a loop, and a trainer that saves and resumes."""

from trlora.training.accelerated import AccelerateMissingError as AccelerateMissingError
from trlora.training.accelerated import accelerator_for as accelerator_for
from trlora.training.config import TrainingConfig as TrainingConfig
from trlora.training.config import TrainingConfigError as TrainingConfigError
from trlora.training.ema import MovingAverage as MovingAverage
from trlora.training.order import Order as Order
from trlora.training.parameter_stacks import ParameterStacks as ParameterStacks
from trlora.training.parameters import trainable_parameters as trainable_parameters
from trlora.training.penalties import Penalty as Penalty
from trlora.training.penalties import penalty as penalty
from trlora.training.state import TrainingState as TrainingState
from trlora.training.state import checkpoints as checkpoints
from trlora.training.state import load_state as load_state
from trlora.training.step import Loss as Loss
from trlora.training.step import Stepped as Stepped
from trlora.training.step import TrainingError as TrainingError
from trlora.training.step import step_ as step_
from trlora.training.step import train_ as train_
from trlora.training.trainer import Callback as Callback
from trlora.training.trainer import StepRecord as StepRecord
from trlora.training.trainer import Trainer as Trainer
from trlora.training.weight_path import WeightPath as WeightPath
