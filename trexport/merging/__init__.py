"""`trexport merge`: adapters folded into the weights of a model, or of a whole pipeline."""

from trexport.merging.model import MergePlan as MergePlan
from trexport.merging.model import merge as merge
from trexport.merging.model import plan_merge as plan_merge
from trexport.merging.pipeline import PipelineMerge as PipelineMerge
from trexport.merging.pipeline import PipelinePlan as PipelinePlan
from trexport.merging.pipeline import merge_pipeline as merge_pipeline
from trexport.merging.pipeline import plan_pipeline_merge as plan_pipeline_merge
