"""MAGNeto (section 3.1): two streams that read the tags, one of which also looks at the photograph, and a gate.

    tags (B, L)                                         photograph (B, 3, S, S)
        │ embedding, dropout                                │ timm backbone, 1x1 convolution, batch norm
        ├───────────────── queries ───────────────┐         │ N x N regions
        │                                         └─ tag-to-image attention ── keys, values
        │ encoder, M layers                                 │ encoder, N layers
    tag stream (B, L, D) ───────────┬────────────── image stream (B, L, D)
        │ linear                 gate (B, L)                │ linear
    tag logits (B, L) ──── (1 - gate) + gate ──── image logits (B, L)
                                    │
                              logits (B, L)

B images, L slots for tags, T tags in all, D hidden size, R regions, C channels of the backbone. States of tags are
(T, D), without the padding, but where the tags of an image attend to each other.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_magneto import MagnetoConfig
from .loss_magneto import OBJECTIVES

# Up to so many, the tags of a batch attend to each other all at once, behind a mask; more are quicker image by image.
MAX_TAGS_IN_ONE_ROW = 128


@dataclass
class MagnetoModelOutput(ModelOutput):
    """Hidden states of the two streams.

    Args:
        tag_hidden_state: (B, L, D), or None for `streams="image"`.
        image_hidden_state: (B, L, D), or None for `streams="tag"`.
        attentions: (B, heads, L, R), what each tag looked at, row-major over the R regions of the feature map;
            only with `output_attentions=True`.
    """

    tag_hidden_state: torch.Tensor | None = None
    image_hidden_state: torch.Tensor | None = None
    attentions: torch.Tensor | None = None


@dataclass
class MagnetoOutput(ModelOutput):
    """Scores of the tags, as logits: `sigmoid(logits)` is the score in [0, 1].

    Values at padded slots mean nothing. Where the configuration has a calibration, each of the three logits is
    calibrated by itself; losses are those of the raw logits, and so is the mixture that the gate makes.

    Args:
        loss: Scalar; the sum that is trained on, with `labels` only.
        logits: (B, L), final output O_Final (equation 1); for a single stream, that stream's. None for outlier
            detection.
        tag_logits: (B, L), output O_t of the tag stream, or None.
        image_logits: (B, L), output O_it of the image stream, or None.
        gate: (B, L), alpha in [0, 1]: the weight of the image stream; only with both streams.
        final_loss: Scalar L_g, of `logits`.
        tag_loss: Scalar L_t, of `tag_logits`.
        image_loss: Scalar L_it, of `image_logits`.
        attentions: As in `MagnetoModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    tag_logits: torch.Tensor | None = None
    image_logits: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    final_loss: torch.Tensor | None = None
    tag_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None
    attentions: torch.Tensor | None = None


class MagnetoSlots:
    """Where the tags of a batch lie in its B x L slots, the others of which are padding.

    Most layers look at one tag at a time. In training they get the tags alone: with few tags an image, most slots are
    padding. Otherwise all slots count as tags, and no shape depends on the data, as exporters wish.

    Args:
        mask: (B, L) bool, which slots hold tags.
        packed: Whether to leave the padding out.
    """

    def __init__(self, mask: torch.Tensor, packed: bool):
        self.shape = mask.shape
        self.positions = mask.flatten().nonzero().squeeze(-1) if packed else None  # (T,)
        self.in_one_row = packed and len(self.positions) <= MAX_TAGS_IN_ONE_ROW
        if self.in_one_row:
            images = self.positions // mask.shape[-1]
            self.attention_mask = (images[:, None] == images)[None, None]  # (1, 1, T, T)
        else:
            # An image whose tags are all padding attends to the padding: its states mean nothing, but they are no NaN.
            self.attention_mask = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]  # (B, 1, 1, L)

    def pack(self, slots: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) -> (T, ...)."""
        slots = slots.flatten(0, 1)
        return slots if self.positions is None else slots.index_select(0, self.positions)

    def unpack(self, tags: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (B, L, ...), with zeros as padding."""
        if self.positions is not None:
            tags = tags.new_zeros(self.shape.numel(), *tags.shape[1:]).index_copy(0, self.positions, tags)
        return tags.unflatten(0, self.shape)

    def to_rows(self, tags: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (1, T, ...) or (B, L, ...): rows within which `attention_mask` lets tags attend to others."""
        return tags.unsqueeze(0) if self.in_one_row else self.unpack(tags)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Back to (T, ...)."""
        return rows.squeeze(0) if self.in_one_row else self.pack(rows)


class MagnetoDropout(nn.Module):
    """Dropout. For each element PyTorch draws 64 random bits, which on CPUs takes longer than many a layer; here it is
    16 bits, so the probability is a multiple of 2^-16."""

    def __init__(self, config: MagnetoConfig):
        super().__init__()
        self.probability = config.dropout
        self.num_kept = max(1, round(2**16 * (1 - config.dropout)))  # of 2^16 numbers

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not self.training or states.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(states, self.probability, self.training)
        numbers = torch.empty((states.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        numbers = numbers.view(torch.int16)[: states.numel()].view(states.shape)
        kept = torch.ge(numbers, 2**15 - self.num_kept, out=torch.empty_like(states))
        return states * kept.mul_(2**16 / self.num_kept)


class MagnetoAttention(nn.Module):
    """Multi-head scaled-dot-product attention of tags to each other or to regions, without positions."""

    def __init__(self, config: MagnetoConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.dropout = MagnetoDropout(config)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        tags: torch.Tensor,
        slots: MagnetoSlots,
        regions: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `tags` (T, D) to the `regions` (B, R, D) of their image, or else to its other tags.

        Returns:
            The result (T, D) and, on request, the attention weights (B, heads, L, R).
        """
        if regions is None:
            query, key, value = (slots.to_rows(layer(tags)) for layer in (self.query, self.key, self.value))
            mask = slots.attention_mask
        else:
            query, key, value, mask = slots.unpack(self.query(tags)), self.key(regions), self.value(regions), None
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (rows, heads, columns, D / heads)
            for states in (query, key, value)
        )
        weights = None
        is_eager = self.config._attn_implementation == "eager"  # as transformers' own models are told
        if is_eager or output_attentions or (self.training and tags.device.type == "cpu"):
            # The fused kernels keep the weights to themselves, and on CPUs their dropout takes longer than all else.
            weights = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
            weights = (weights if mask is None else weights.masked_fill(~mask, -torch.inf)).softmax(-1)
            attended = self.dropout(weights) @ value
        else:
            dropout = self.dropout.probability if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        attended = attended.transpose(1, 2).flatten(2)  # (rows, columns, D)
        attended = slots.from_rows(attended) if regions is None else slots.pack(attended)
        return self.output(attended), weights if output_attentions else None


class MagnetoEncoderLayer(nn.Module):
    """Post-norm encoder layer as in BERT; `self_attention=False` leaves the feed-forward half, FF's residual block."""

    def __init__(self, config: MagnetoConfig, self_attention: bool):
        super().__init__()
        self.attention = MagnetoAttention(config) if self_attention else None
        self.attention_norm = nn.LayerNorm(config.hidden_size) if self_attention else None
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = MagnetoDropout(config)

    def forward(self, states: torch.Tensor, slots: MagnetoSlots) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        if self.attention is not None:
            attended, _ = self.attention(states, slots)
            states = self.attention_norm(states + self.dropout(attended))
        transformed = self.output(self.dropout(F.relu(self.intermediate(states))))
        return self.output_norm(states + self.dropout(transformed))


class MagnetoEncoder(nn.Module):
    """Layers over a set of tags: no positions, so the order of the tags changes nothing; ReLU on the result."""

    def __init__(self, config: MagnetoConfig, num_layers: int, self_attention: bool = True):
        super().__init__()
        self.layers = nn.ModuleList(MagnetoEncoderLayer(config, self_attention) for _ in range(num_layers))

    def forward(self, states: torch.Tensor, slots: MagnetoSlots) -> torch.Tensor:
        """(T, D) -> (T, D), at least 0."""
        for layer in self.layers:
            states = layer(states, slots)
        return F.relu(states)


def _create_backbone(config: MagnetoConfig) -> nn.Module:
    # Never pretrained here: loading weights would download, and `from_pretrained` brings its own.
    return timm.create_model(
        config.backbone, pretrained=False, num_classes=0, global_pool="", **(config.backbone_kwargs or {})
    )


class MagnetoPointwiseConvolution(nn.Conv2d):
    """A 1x1 convolution, computed as the linear layer that it is: on CPUs in half of the time."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, D, h, w), channels last in memory."""
        return F.linear(features.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class MagnetoImageFeatureExtractor(nn.Module):
    """timm backbone without pooling and classifier, a 1x1 convolution to the hidden size, batch norm."""

    def __init__(self, config: MagnetoConfig):
        super().__init__()
        self.backbone = _create_backbone(config)
        # timm has initialised its modules; the flag of each tensor keeps transformers from doing it again. Tensors on
        # the meta device are replaced when weights are loaded, and `init_missing` fills what a checkpoint lacks.
        for tensor in (*self.backbone.parameters(), *self.backbone.buffers()):
            tensor._is_hf_initialized = not tensor.is_meta
        self.projection = MagnetoPointwiseConvolution(self.backbone.num_features, config.hidden_size, kernel_size=1)
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        self.frozen_modules = self._find_frozen_modules(config)
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        self.frozen_norms = [
            module for module in self.backbone.modules() if config.freeze_backbone_norm and isinstance(module, norms)
        ]
        self.train()

    def init_missing(self, config: MagnetoConfig) -> None:
        """Give what a checkpoint lacks of the backbone timm's own initialisation."""
        tensors = self.backbone.state_dict(keep_vars=True)
        missing = [name for name, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            fresh = _create_backbone(config).state_dict()
            for name in missing:
                tensors[name].copy_(fresh[name])
                tensors[name]._is_hf_initialized = True

    def _find_frozen_modules(self, config: MagnetoConfig) -> list[nn.Module]:
        """Modules of the backbone all of whose parameters are frozen; of nested ones the outermost."""
        num_trainable = config.num_trainable_backbone_stages
        trainable: set[str] = set()
        # A model on the meta device is being loaded, and was checked when it was made.
        if num_trainable or not next(self.backbone.parameters()).is_meta:
            stages = self._find_stages(config)
            if num_trainable > len(stages):
                raise ValueError(
                    f"num_trainable_backbone_stages is {num_trainable}, "
                    f"expected at most the {len(stages)} stages of {config.backbone}"
                )
            trainable_stages = stages if num_trainable == -1 else stages[len(stages) - num_trainable :]
            trainable.update(*trainable_stages)
        frozen: dict[str, nn.Module] = {}
        for prefix, module in self.backbone.named_modules():
            names = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()}
            is_inside = "" in frozen or any(prefix.startswith(f"{outer}.") for outer in frozen)
            if names and names.isdisjoint(trainable) and not is_inside:
                frozen[prefix] = module
        return list(frozen.values())

    def _find_stages(self, config: MagnetoConfig) -> list[set[str]]:
        """Names of the parameters that the feature map depends on, from the stem to the top.

        The stages are timm's coarse groups. Some backbones keep parts of their classifier, which nothing here uses,
        and some have a last norm in a group of its own, which belongs to the stage before.
        """
        # A copy without storage answers which parameters matter, quickly and also under `torch.inference_mode`.
        with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
            backbone = _create_backbone(config).eval()
            parameters = dict(backbone.named_parameters())
            size = config.image_size
            try:
                features = backbone.forward_features(torch.zeros(1, 3, size, size))
            except (AssertionError, RuntimeError) as error:
                raise ValueError(f"the backbone {config.backbone} cannot be used at {size} px: {error}") from error
            if features.ndim != 4:
                raise ValueError(
                    f"the backbone {config.backbone} returns {tuple(features.shape)}, "
                    "expected a feature map (images, channels, height, width)"
                )
            gradients = torch.autograd.grad(features.sum(), parameters.values(), allow_unused=True)
        used = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
        stages: list[set[str]] = []
        for _, group in sorted(group_parameters(backbone, backbone.group_matcher(coarse=True)).items()):
            names = used.intersection(group)
            if stages and all(parameters[name].ndim == 1 for name in names):
                stages[-1] |= names
            else:
                stages.append(names)
        return stages

    def train(self, mode: bool = True):
        """Sets the mode, but keeps frozen stages in eval mode: their batch-norm statistics never move."""
        is_frozen = not (self.backbone.training or next(self.backbone.parameters()).requires_grad)
        if mode and is_frozen and self.frozen_modules == [self.backbone]:
            # Trainer comes here before each step: spare it the many modules of a backbone that stays as it is.
            self.training = mode
            self.projection.train(mode)
            self.norm.train(mode)
            return self
        super().train(mode)
        # `from_pretrained` forgets both layout and `requires_grad`, and calls this when it is done.
        self.backbone.to(memory_format=torch.channels_last)
        for module in self.frozen_modules:
            module.eval().requires_grad_(False)
        for module in self.frozen_norms:
            module.eval()
        return self

    def feature_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The backbone's alone: (B, 3, H, W), normalised -> (B, C, h, w)."""
        # Convolutions are about twice as fast with the channels last, on CPUs and GPUs alike; `train` sees to
        # their weights.
        pixel_values = pixel_values.to(self.projection.weight.dtype).contiguous(memory_format=torch.channels_last)
        features = self.backbone.forward_features(pixel_values)
        return features.permute(0, 3, 1, 2) if self.channels_last else features

    def forward(
        self, pixel_values: torch.Tensor | None = None, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Photographs, or their feature maps (B, C, h, w) -> one vector for each region, row by row (B, R, D)."""
        if image_features is None:
            image_features = self.feature_map(pixel_values)
        image_features = image_features.to(self.projection.weight.dtype)
        return self.norm(self.projection(image_features)).flatten(2).transpose(1, 2)


class MagnetoGate(nn.Module):
    """Gating layer (table 1), up to its sigmoid: how far to trust the image stream, for each tag."""

    def __init__(self, config: MagnetoConfig):
        super().__init__()
        self.dropout = MagnetoDropout(config)
        self.intermediate = nn.Linear(2 * config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, 1)

    def forward(self, tag_states: torch.Tensor, image_states: torch.Tensor) -> torch.Tensor:
        """(T, D) of both streams -> logits of alpha (T,)."""
        states = self.dropout(torch.cat([tag_states, image_states], dim=-1))  # (T, 2 D)
        return self.output(self.dropout(F.relu(self.intermediate(states)))).squeeze(-1)


class MagnetoStreamHeads(nn.Module):
    """One linear classifier for each stream there is."""

    def __init__(self, config: MagnetoConfig):
        super().__init__()
        self.tag = nn.Linear(config.hidden_size, 1) if config.streams != "image" else None
        self.image = nn.Linear(config.hidden_size, 1) if config.streams != "tag" else None

    def forward(
        self, tag_states: torch.Tensor | None, image_states: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(T, D) of each stream there is -> tag logits and image logits, each (T,) or None."""
        tag_logits = self.tag(tag_states).squeeze(-1) if self.tag is not None else None
        image_logits = self.image(image_states).squeeze(-1) if self.image is not None else None
        return tag_logits, image_logits


def mixture_logits(gate_logits: torch.Tensor, image_logits: torch.Tensor, tag_logits: torch.Tensor) -> torch.Tensor:
    """Logit of `alpha * O_it + (1 - alpha) * O_t` (equation 1), from the logits of all three, without leaving logs.

    Args:
        gate_logits, image_logits, tag_logits: Of the same shape, any real numbers.

    Returns:
        float32 of that shape, finite wherever the inputs are.
    """
    logits = torch.stack([gate_logits.float(), image_logits.float(), tag_logits.float()])
    log_alpha, log_image, log_tag = F.logsigmoid(logits)
    log_rest, log_no_image, log_no_tag = F.logsigmoid(-logits)
    log_kept = torch.logaddexp(log_alpha + log_image, log_rest + log_tag)
    log_dropped = torch.logaddexp(log_alpha + log_no_image, log_rest + log_no_tag)
    return log_kept - log_dropped


class MagnetoCalibration(nn.Module):
    """Platt scaling of one output, with the numbers that the configuration holds: nothing here is trained or saved.

    Args:
        vocab_size: Number of tag embeddings.
        temperature, bias, tag_biases: As in `MagnetoConfig.calibration`.
    """

    def __init__(self, vocab_size: int, temperature: float, bias: float, tag_biases: dict[str, float] | None = None):
        super().__init__()
        self.temperature = temperature
        self.bias = bias
        self.tag_biases = tag_biases or {}
        self.register_buffer("biases", torch.empty(vocab_size, dtype=torch.float32), persistent=False)
        self.init_non_persistent_buffers()

    @torch.no_grad()
    def init_non_persistent_buffers(self):
        """Called again by `_init_weights`: `from_pretrained` builds the model on a device without storage."""
        self.biases.fill_(self.bias)
        indices = [int(index) for index in self.tag_biases]
        self.biases[indices] += self.biases.new_tensor(list(self.tag_biases.values()))

    def forward(self, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Raw logits and indices of the tags, both (B, L), -> calibrated logits (B, L) float32."""
        return logits.float() / self.temperature + self.biases[input_ids]


class MagnetoPreTrainedModel(PreTrainedModel):
    """What the MAGNeto models share: configuration, initialisation, saving and loading."""

    config_class = MagnetoConfig
    base_model_prefix = "magneto"
    main_input_name = "input_ids"
    _supports_sdpa = True
    # Our losses are means already: Trainer must not divide them by a number of tokens.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def initialize_weights(self):
        """Called when a model is made, and when it is loaded, for what the checkpoint lacks."""
        if hasattr(self.base_model, "image_feature_extractor"):
            self.base_model.image_feature_extractor.init_missing(self.config)
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """PyTorch's own initialisation, as the paper has it."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, nn.BatchNorm2d):
            super()._init_weights(module)
        elif hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()


def _check_shape(name: str, tensor: torch.Tensor, input_ids: torch.Tensor) -> None:
    if tensor.shape != input_ids.shape:  # it might be broadcast, to another image's
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected the shape of input_ids, {tuple(input_ids.shape)}")


class MagnetoModel(MagnetoPreTrainedModel):
    """The two streams without heads (figure 2): tags, and but for `streams="tag"` a photograph, to hidden states."""

    def __init__(self, config: MagnetoConfig):
        super().__init__(config)
        self.tag_embedder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.dropout = MagnetoDropout(config)
        if config.streams != "image":
            self_attention = config.tag_encoder == "transformer"
            self.tag_encoder = MagnetoEncoder(config, config.num_tag_layers, self_attention)
        if config.streams != "tag":
            self.image_feature_extractor = MagnetoImageFeatureExtractor(config)
            self.tag_to_image_attention = MagnetoAttention(config)
            self.image_encoder = MagnetoEncoder(config, config.num_image_layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tag_embedder

    def set_input_embeddings(self, value: nn.Embedding):
        self.tag_embedder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MagnetoModelOutput:
        """Encode a batch of tag sets and their photographs.

        Args:
            input_ids: (B, L) int64, indices of the tags, in any order.
            attention_mask: (B, L), 1 for tags and 0 for padding; by default everything but `[PAD]` is a tag.
            pixel_values: (B, 3, H, W) float, normalised photographs; not used by `streams="tag"`.
            image_features: (B, C, h, w) float, instead of photographs what the backbone makes of them, as
                `image_feature_extractor.feature_map` returns it: a frozen backbone need not compute it twice.
            output_attentions: Return what each tag looked at; by default as the configuration says.

        Raises:
            ValueError: There is no photograph, and the model needs one, or there are not as many as lists of tags; or
                the mask has another shape than the indices.
        """
        slots, tag_states, image_states, attentions = self.encode(
            input_ids, attention_mask, pixel_values, image_features, output_attentions
        )
        tag_states = None if tag_states is None else slots.unpack(tag_states)
        image_states = None if image_states is None else slots.unpack(image_states)
        return MagnetoModelOutput(tag_states, image_states, attentions)

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        output_attentions: bool | None,
    ) -> tuple[MagnetoSlots, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """What `forward` returns, still packed: slots, states of the tags (T, D) in both streams, attentions."""
        if pixel_values is None and image_features is None and self.config.streams != "tag":
            raise ValueError(
                f"pixel_values is missing: a model with streams={self.config.streams!r} needs photographs"
            )
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        _check_shape("attention_mask", attention_mask, input_ids)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        # A compiler wants shapes that do not depend on the data, too.
        packed = self.training and not torch.compiler.is_compiling()
        slots = MagnetoSlots(attention_mask.bool(), packed)
        tags = self.dropout(self.tag_embedder(slots.pack(input_ids)))  # (T, D)

        tag_states = None
        if self.config.streams != "image":
            tag_states = self.tag_encoder(tags, slots)  # (T, D)

        image_states = attentions = None
        if self.config.streams != "tag":
            regions = self.image_feature_extractor(pixel_values, image_features)  # (B, R, D)
            if regions.shape[0] != input_ids.shape[0]:  # a single photograph would be everybody's
                raise ValueError(f"found {regions.shape[0]} photographs for {input_ids.shape[0]} lists of tags")
            looked_at, attentions = self.tag_to_image_attention(tags, slots, regions, output_attentions)
            image_states = self.image_encoder(self.dropout(F.relu(looked_at)), slots)  # (T, D)

        return slots, tag_states, image_states, attentions


class MagnetoForTagSummarization(MagnetoPreTrainedModel):
    """MAGNeto for extractive tags summarization: which of the tags say what the photograph is about."""

    def __init__(self, config: MagnetoConfig):
        super().__init__(config)
        self.magneto = MagnetoModel(config)
        self.classifiers = MagnetoStreamHeads(config)
        if config.streams == "both":
            self.gate = MagnetoGate(config)
        self.calibration = self._create_calibration()
        self.post_init()

    def set_calibration(self, calibration: dict[str, dict[str, Any]] | None) -> None:
        """Give calibrated outputs from now on, or with None raw ones.

        Args:
            calibration: As in `MagnetoConfig.calibration`, where it is kept.

        Raises:
            huggingface_hub.errors.StrictDataclassError: It has a wrong field or value.
        """
        MagnetoConfig(vocab_size=self.config.vocab_size, calibration=calibration)  # what is wrong with it, it says
        self.config.calibration = calibration
        self.calibration = self._create_calibration()

    def _create_calibration(self) -> nn.ModuleDict | None:
        if self.config.calibration is None:
            return None
        self.config.validate_calibration()  # `from_pretrained` may have given it another vocab_size
        return nn.ModuleDict(
            {
                name: MagnetoCalibration(self.config.vocab_size, **fields)
                for name, fields in self.config.calibration.items()
            }
        ).to(self.device)

    def _calibrate(self, name: str, logits: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor | None:
        if logits is None or self.calibration is None or name not in self.calibration:
            return logits
        return self.calibration[name](logits, input_ids)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As every model's; the calibration loses the biases of tags that are gone."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.calibration is not None:
            calibration = copy.deepcopy(self.config.calibration)
            for fields in calibration.values():
                biases = fields.pop("tag_biases", {}).items()
                fields["tag_biases"] = {index: bias for index, bias in biases if int(index) < self.config.vocab_size}
            self.set_calibration(calibration)
        return embeddings

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As every model's, and a folder that `pipeline` can load."""
        # transformers copies the files that this one imports, at whatever place it does so: the pipeline's too.
        from .pipeline_magneto import TagSummarizationPipeline

        implementation = f"pipeline_magneto.{TagSummarizationPipeline.__name__}"
        # Under the Hub's name for it too, which the Hub puts into the code that it shows beside a model.
        self.config.custom_pipelines = {
            task: {"impl": implementation, "pt": ["AutoModel"]}
            for task in ("tag-summarization", "zero-shot-image-classification")
        }
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MagnetoOutput:
        """Score every tag of every image.

        Args:
            input_ids: (B, L) int64, indices of the tags.
            attention_mask: (B, L), 1 for tags and 0 for padding.
            pixel_values, image_features: As in `MagnetoModel.forward`.
            labels: (B, L), 1 for important tags, 0 for the others, -100 where it is unknown or padding.
            output_attentions: Return what each tag looked at.
        """
        slots, tag_states, image_states, attentions = self.magneto.encode(
            input_ids, attention_mask, pixel_values, image_features, output_attentions
        )
        tag_logits, image_logits = self.classifiers(tag_states, image_states)  # (T,)

        gate = None
        if self.config.streams == "both":
            gate_logits = self.gate(tag_states, image_states)  # (T,)
            logits = mixture_logits(gate_logits, image_logits, tag_logits)
            logits, tag_logits, image_logits = map(slots.unpack, (logits, tag_logits, image_logits))  # (B, L)
            gate = slots.unpack(torch.sigmoid(gate_logits))
        else:  # a single stream is its own final output
            logits = slots.unpack(image_logits if tag_logits is None else tag_logits)
            tag_logits, image_logits = (None if part is None else logits for part in (tag_logits, image_logits))

        loss = final_loss = tag_loss = image_loss = None
        if labels is not None:
            _check_shape("labels", labels, input_ids)
            objective = OBJECTIVES[self.config.objective]
            if self.config.streams == "both":
                outputs = torch.stack([logits, tag_logits.float(), image_logits.float()])  # (3, B, L)
                final_loss, tag_loss, image_loss = objective(outputs, labels)
                loss = final_loss + self.config.auxiliary_loss_weight * (image_loss + tag_loss)  # equation 5
            else:
                loss = final_loss = objective(logits, labels)

        return MagnetoOutput(
            loss=loss,
            logits=self._calibrate("logits", logits, input_ids),
            tag_logits=self._calibrate("tag_logits", tag_logits, input_ids),
            image_logits=self._calibrate("image_logits", image_logits, input_ids),
            gate=gate,
            final_loss=final_loss,
            tag_loss=tag_loss,
            image_loss=image_loss,
            attentions=attentions,
        )


class MagnetoForOutlierDetection(MagnetoPreTrainedModel):
    """The pre-training model of section 5.2: each stream tells an image's own tags from strange ones; no gate.

    Its heads bear another name than those of `MagnetoForTagSummarization`, so `from_pretrained` hands over the
    backbone, the embeddings, the attention and the encoders, and starts heads and gate afresh.
    """

    def __init__(self, config: MagnetoConfig):
        super().__init__(config)
        self.magneto = MagnetoModel(config)
        self.detectors = MagnetoStreamHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MagnetoOutput:
        """As `MagnetoForTagSummarization.forward`; a label is 1 for an own tag and 0 for a strange one.

        The loss is L_u = L_it + L_t. There is no final output: `logits` is None.
        """
        slots, tag_states, image_states, attentions = self.magneto.encode(
            input_ids, attention_mask, pixel_values, image_features, output_attentions
        )
        tag_logits, image_logits = (
            None if logits is None else slots.unpack(logits) for logits in self.detectors(tag_states, image_states)
        )  # (B, L)

        loss = tag_loss = image_loss = None
        if labels is not None:
            _check_shape("labels", labels, input_ids)
            objective = OBJECTIVES[self.config.objective]
            tag_loss = None if tag_logits is None else objective(tag_logits, labels)
            image_loss = None if image_logits is None else objective(image_logits, labels)
            loss = sum(part for part in (image_loss, tag_loss) if part is not None)

        return MagnetoOutput(
            loss=loss,
            tag_logits=tag_logits,
            image_logits=image_logits,
            tag_loss=tag_loss,
            image_loss=image_loss,
            attentions=attentions,
        )


__all__ = ["MagnetoForOutlierDetection", "MagnetoForTagSummarization", "MagnetoModel", "MagnetoPreTrainedModel"]
