"""Configuration of the MAGNeto models."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CALIBRATED_OUTPUTS = ("logits", "tag_logits", "image_logits")


@strict
class MagnetoConfig(PreTrainedConfig):
    """Architecture of a MAGNeto model; the defaults are the paper's NUS-WIDE setting (appendix A).

    The architectures of figure 2 by field:

    | architecture | `streams` | `tag_encoder` | `auxiliary_loss_weight` |
    |---|---|---|---|
    | (a) FF | `"tag"` | `"feed_forward"` | no effect |
    | (b) TF-t | `"tag"` | `"transformer"` | no effect |
    | (c) TF-it | `"image"` | no effect | no effect |
    | (d) MAGNeto | `"both"` | `"transformer"` | 0 |
    | (d) MAGNeto with auxiliary losses | `"both"` | `"transformer"` | 1 |

    Args:
        vocab_size: Number of tag embeddings, `[PAD]` and `[UNK]` included (81 concepts and these two).
        pad_token_id: Index of `[PAD]`.
        hidden_size: d_model, the width of every hidden state; a multiple of `num_attention_heads`.
        num_attention_heads: Heads of every attention.
        intermediate_size: d_ff, the inner width of the feed-forward layers and of the gate.
        num_tag_layers: M, the encoder layers of the tag stream.
        num_image_layers: N, the encoder layers of the image stream.
        dropout: Dropout probability of the whole architecture, in [0, 1).
        max_tags: l, the number of tags to which training examples are cut. Prediction is never cut.
        streams: `"both"` (MAGNeto), `"image"` (TF-it) or `"tag"` (TF-t, FF; builds no backbone).
        tag_encoder: `"transformer"`, or `"feed_forward"` for the FF baseline.
        objective: `"bce_dice"` (equation 4) or `"bce"` (equation 2, for the comparison of figure 3).
        auxiliary_loss_weight: Weight of L_it + L_t beside L_g (equation 5).
        backbone: Name of a timm model that has a feature map.
        backbone_kwargs: Further arguments of `timm.create_model`.
        num_trainable_backbone_stages: How many stages of the backbone are trained, counted from the top; the rest is
            frozen and in eval mode. 0 freezes everything (NUS-WIDE), 1 trains ResNet's last block (the large-scale
            setting), -1 trains everything. Stages are timm's coarse parameter groups; the stem is one of them.
        freeze_backbone_norm: Batch norm stays in eval mode in trained stages too: its statistics never move. For small
            batches, and for weights into which the statistics have been folded.
        image_size: Height and width of the photographs, in pixels.
        calibration: Turns raw outputs into calibrated ones, `logit / temperature + bias + tag bias`. For some of
            `"logits"`, `"tag_logits"` and `"image_logits"`, it has a mapping of `temperature` (above 0), `bias` and,
            optionally, `tag_biases`: the index of a tag, as text, to its own bias. `None`, the paper's, leaves the
            outputs raw. Losses are those of the raw outputs in any case; `MagnetoForOutlierDetection` ignores it. In a
            model that is there already, `set_calibration` changes it.

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has a wrong type or value; the message names the field.
    """

    model_type = "magneto"
    # Trainer collects the outputs of every image; these are no such thing.
    keys_to_ignore_at_inference = ["final_loss", "tag_loss", "image_loss", "attentions"]

    vocab_size: int = 83
    pad_token_id: int = 0
    hidden_size: int = 128
    num_attention_heads: int = 4
    intermediate_size: int = 512
    num_tag_layers: int = 2
    num_image_layers: int = 1
    dropout: float | int = 0.3
    max_tags: int = 16
    streams: Literal["both", "image", "tag"] = "both"
    tag_encoder: Literal["transformer", "feed_forward"] = "transformer"
    objective: Literal["bce_dice", "bce"] = "bce_dice"
    auxiliary_loss_weight: float | int = 1.0
    backbone: str = "resnet18"
    backbone_kwargs: dict[str, Any] | None = None
    num_trainable_backbone_stages: int = 0
    freeze_backbone_norm: bool = False
    image_size: int = 112
    calibration: dict[str, dict[str, Any]] | None = None

    def validate_sizes(self):
        """Every size is positive, and the heads divide the hidden size."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "num_tag_layers",
            "num_image_layers",
            "max_tags",
            "image_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, expected a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}, expected an index below vocab_size")
        if self.num_trainable_backbone_stages < -1:
            raise ValueError(
                f"num_trainable_backbone_stages is {self.num_trainable_backbone_stages}, "
                "expected -1 (all stages) or a number of stages"
            )

    def validate_ratios(self):
        """Dropout is a probability, and the weight of a loss is not negative."""
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a probability in [0, 1)")
        if not 0 <= self.auxiliary_loss_weight < float("inf"):
            raise ValueError(f"auxiliary_loss_weight is {self.auxiliary_loss_weight}, expected at least 0")

    def validate_calibration(self):
        """Calibration has known outputs, finite numbers, positive temperatures, and biases of tags that there are."""
        for output, fields in (self.calibration or {}).items():
            name = f"calibration[{output!r}]"
            if output not in CALIBRATED_OUTPUTS:
                raise ValueError(f"{name} is unknown, expected some of {', '.join(CALIBRATED_OUTPUTS)}")
            if not {"temperature", "bias"} <= fields.keys() <= {"temperature", "bias", "tag_biases"}:
                raise ValueError(f"{name} has {', '.join(fields)}, expected temperature, bias, at most tag_biases")
            tag_biases = fields.get("tag_biases", {})
            if not isinstance(tag_biases, dict):
                raise ValueError(f"{name} has tag_biases {tag_biases!r}, expected a mapping of indices to numbers")
            for index in tag_biases:
                if not (isinstance(index, str) and index.isdecimal() and int(index) < self.vocab_size):
                    raise ValueError(
                        f"{name} has a bias of tag {index!r}, expected an index below vocab_size, as text"
                    )
            for value in (fields["temperature"], fields["bias"], *tag_biases.values()):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise ValueError(f"{name} has the value {value!r}, expected finite numbers")
            if fields["temperature"] <= 0:
                raise ValueError(f"{name} has temperature {fields['temperature']}, expected a number above 0")


__all__ = ["MagnetoConfig"]
