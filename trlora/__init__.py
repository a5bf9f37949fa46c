"""trlora: tensor-ring adapters and their relatives, `W' = W0·T + Δ` (TLoRA, arXiv 2501.08727).

Needs torch and safetensors only.
"""

from trlora.adapter import Adapter as Adapter
from trlora.adapter import adapter_from_model as adapter_from_model
from trlora.checkpoint import load_adapter as load_adapter
from trlora.checkpoint import save_adapter as save_adapter
from trlora.config import AdapterConfig as AdapterConfig
from trlora.config import BaseModel as BaseModel
from trlora.errors import CheckpointError as CheckpointError
from trlora.errors import ShapeError as ShapeError
from trlora.errors import SpecError as SpecError
from trlora.errors import TargetError as TargetError
from trlora.errors import TrloraError as TrloraError
from trlora.inject import adapted_modules as adapted_modules
from trlora.inject import attach_ as attach_
from trlora.inject import inject_ as inject_
from trlora.inject import remove_ as remove_
from trlora.inject import set_strengths_ as set_strengths_
from trlora.inject import shapes_of as shapes_of
from trlora.layers import AdaptedConv2d as AdaptedConv2d
from trlora.layers import AdaptedLayer as AdaptedLayer
from trlora.layers import AdaptedLinear as AdaptedLinear
from trlora.layers import LayerAdapter as LayerAdapter
from trlora.layers import adapted_bias as adapted_bias
from trlora.layers import adapted_weight as adapted_weight
from trlora.layers import weight_change as weight_change
from trlora.merge import LayerMerge as LayerMerge
from trlora.merge import MergeReport as MergeReport
from trlora.merge import merge_ as merge_
from trlora.merge import merge_layer as merge_layer
from trlora.parts import LayerParts as LayerParts
from trlora.spec import AdapterSpec as AdapterSpec
from trlora.targets import find_targets as find_targets
