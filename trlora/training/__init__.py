"""Training adapters: their parameters, penalties as loss terms, and a loop."""

from trlora.training.loop import TrainingError as TrainingError
from trlora.training.loop import train_ as train_
from trlora.training.loop import trainable_parameters as trainable_parameters
from trlora.training.penalties import Penalty as Penalty
from trlora.training.penalties import penalty as penalty
