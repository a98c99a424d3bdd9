"""MAGNeto for transformers. Importing this package registers it, so that the `Auto` classes know it by name."""

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_magneto import MagnetoConfig
from .modeling_magneto import (
    MagnetoForOutlierDetection,
    MagnetoForTagSummarization,
    MagnetoModel,
    MagnetoPreTrainedModel,
)
from .pipeline_magneto import TagSummarizationPipeline
from .processing_magneto import MagnetoProcessor

AutoConfig.register("magneto", MagnetoConfig)
# Of several classes, AutoModel takes the one that the saved configuration names; the first one otherwise.
AutoModel.register(MagnetoConfig, (MagnetoForTagSummarization, MagnetoForOutlierDetection, MagnetoModel))
AutoProcessor.register(MagnetoConfig, MagnetoProcessor)
PIPELINE_REGISTRY.register_pipeline("tag-summarization", TagSummarizationPipeline, pt_model=AutoModel)

# Saved folders carry their own code, for `trust_remote_code=True` where this package is not installed.
MagnetoConfig.register_for_auto_class()
MagnetoModel.register_for_auto_class("AutoModel")
MagnetoForTagSummarization.register_for_auto_class("AutoModel")
MagnetoForOutlierDetection.register_for_auto_class("AutoModel")
MagnetoProcessor.register_for_auto_class()

__all__ = [
    "MagnetoConfig",
    "MagnetoForOutlierDetection",
    "MagnetoForTagSummarization",
    "MagnetoModel",
    "MagnetoPreTrainedModel",
    "MagnetoProcessor",
    "TagSummarizationPipeline",
]
