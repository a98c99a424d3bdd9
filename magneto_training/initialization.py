"""Where a model starts: at ImageNet weights, word vectors (section 3.1), a MAGNeto (section 5.2) or a checkpoint."""

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModel, AutoProcessor

from modeling_magneto import MagnetoPreTrainedModel, MagnetoProcessor
from modeling_magneto.processing_magneto import normalize_tag

from .arguments import ModelArguments, UserError
from .backbone import prepare_backbone, resolve_normalization
from .checkpoints import check_checkpoint

EMBEDDING = "tag_embedder.weight"


def start_model(
    model_class: type[MagnetoPreTrainedModel],
    vocabulary: Sequence[str],
    model_args: ModelArguments,
    seed: int,
    checkpoint: str | None = None,
) -> tuple[MagnetoPreTrainedModel, MagnetoProcessor]:
    """The model of a training run and its processor: new, or as an interrupted run has left it.

    Args:
        model_class: What to train.
        vocabulary: The tags of the training split.
        model_args: What the model is and, without a checkpoint, where its weights come from.
        seed: As in `initialize_model`.
        checkpoint: A folder as of `find_checkpoint`.

    Raises:
        UserError: As `new_model`, `initialize_model` and `check_checkpoint`.
    """
    image_mean, image_std = resolve_normalization(model_args)
    use_images = model_args.streams != "tag"
    processor = MagnetoProcessor.from_vocabulary(
        vocabulary, model_args.image_size, image_mean, image_std, model_args.max_tags, use_images
    )
    model = new_model(model_class, processor, model_args)
    if checkpoint is None:
        initialize_model(model, processor, model_args, seed)
    else:
        check_checkpoint(checkpoint, model, processor)
        # Into the memory that the interrupted run had: elsewhere, other kernels may round otherwise.
        model.load_state_dict(model_class.from_pretrained(checkpoint).state_dict())
    return model, processor


def new_model(
    model_class: type[MagnetoPreTrainedModel], processor: MagnetoProcessor, model_args: ModelArguments
) -> MagnetoPreTrainedModel:
    """A model with random weights, as the arguments say.

    Raises:
        UserError: A value is out of range, or the backbone cannot be used; the message says which.
    """
    config = model_args.to_config(vocab_size=len(processor.tokenizer))
    try:
        return model_class(config)
    except (ValueError, TypeError, RuntimeError) as error:  # ours, and timm's of backbone_kwargs
        raise UserError(" ".join(str(error).split())) from error
    except (AttributeError, LookupError, AssertionError) as error:
        if not config.backbone_kwargs:  # a mistake of our own
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        found = f"backbone_kwargs is {config.backbone_kwargs}, which the backbone {config.backbone!r} does not take"
        raise UserError(f"{found} ({reason})") from error


def initialize_model(
    model: MagnetoPreTrainedModel, processor: MagnetoProcessor, model_args: ModelArguments, seed: int
) -> None:
    """Give a newly made model the weights that the arguments name, and print what was copied and what was not.

    Args:
        model: Changed in place. Nothing is frozen that its configuration does not freeze.
        processor: The model's.
        model_args: `init_from`, `tag_vectors` and `backbone_weights`.
        seed: Of the projection of tag vectors.

    Raises:
        UserError: Weights cannot be had, or do not fit.
    """
    # Training rows have no unknown tags: a random embedding would stay, and be like those of some tags by chance.
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.unk_token_id] = 0
    source = None if model_args.init_from is None else load_source(model_args.init_from)
    if processor.use_images:
        brings_backbone = source is not None and source[0].config.streams != "tag"
        prepare_backbone(model.base_model, "none" if brings_backbone else model_args.backbone_weights)
    if model_args.tag_vectors is not None:
        print(init_tag_vectors(model, processor, model_args.tag_vectors, seed), flush=True)
    if source is not None:
        print(f"{model_args.init_from}: {copy_weights(*source, model, processor)}", flush=True)


def load_source(folder: str) -> tuple[MagnetoPreTrainedModel, MagnetoProcessor]:
    """A trained MAGNeto of any kind and its processor, from a folder or the Hub.

    Raises:
        UserError: There is none, or its weights are not all there.
    """
    if not Path(folder).exists() and (folder.startswith((".", "/", "~")) or folder.count("/") > 1):
        raise UserError(f"the model {folder!r} cannot be loaded: there is no such folder")
    try:
        # What is missing or has another shape, transformers makes up, and warns; we refuse it below, by name.
        model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"the model {folder!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if not isinstance(model, MagnetoPreTrainedModel):
        raise UserError(f"{folder!r} holds a {type(model).__name__}, expected a MAGNeto model")
    for problem, names in {
        "lacks tensors": loading["missing_keys"],
        "has tensors of another shape": {name for name, *_ in loading["mismatched_keys"]},
    }.items():
        if names:
            found = f"{problem}: {len(names)}, the first is {min(names)}"
            raise UserError(f"the model {folder!r} {found}; expected what its config.json says")
    return model, processor


def copy_weights(
    source: MagnetoPreTrainedModel,
    source_processor: MagnetoProcessor,
    model: MagnetoPreTrainedModel,
    processor: MagnetoProcessor,
) -> str:
    """Copy feature extractor, tag embeddings, tag-to-image attention and encoders; heads and gate stay fresh.

    Embeddings are carried over by tag, so the vocabularies may differ.

    Args:
        source, source_processor: Where to copy from.
        model, processor: The new model, changed in place, and its processor.

    Returns:
        What was copied and what was not, for people.

    Raises:
        UserError: A part that both have is another one in the source: its backbone, its depth, the shape of a weight.
    """
    old, new = source.base_model.state_dict(), model.base_model.state_dict()
    shared = {_part_of(name) for name in old} & {_part_of(name) for name in new}
    if "image_feature_extractor" in shared:
        for field in ("backbone", "backbone_kwargs"):
            found, expected = getattr(source.config, field), getattr(model.config, field)
            if found != expected:
                raise UserError(f"init_from: {field} is {found!r}, expected {expected!r} as in this run")
    for name in sorted(old.keys() ^ new.keys()):
        if _part_of(name) in shared:
            found, expected = ("missing", "one") if name in new else ("there", "none as in this run")
            raise UserError(f"init_from: the weight {name} is {found}, expected {expected}")
    weights = {name: old[name] for name in new if name in old and name != EMBEDDING}
    for name in (*weights, EMBEDDING):
        found, expected = old[name].shape, new[name].shape
        if found[1:] != expected[1:] or (name != EMBEDDING and found != expected):
            raise UserError(f"init_from: the weight {name} is {tuple(found)}, expected {tuple(expected)}")

    old_indices = source_processor.tokenizer.get_vocab()
    carried = {tag: index for tag, index in processor.tokenizer.get_vocab().items() if tag in old_indices}
    weights[EMBEDDING] = new[EMBEDDING].clone()
    for tag, index in carried.items():
        weights[EMBEDDING][index] = old[EMBEDDING][old_indices[tag]]
    model.base_model.load_state_dict({**new, **weights})

    known = sum(tag in carried for tag in processor.vocabulary)
    copied = sorted(shared - {"tag_embedder"})
    fresh = sorted({_part_of(name) for name in new} - shared)
    fresh += [name for name, _ in model.named_children() if name != model.base_model_prefix]
    return (
        f"copied {', '.join(copied)} and the embeddings of {known} of {len(processor.vocabulary)} tags; "
        f"started afresh: {', '.join(fresh)}"
    )


def _part_of(name: str) -> str:
    """The part of the model that a weight belongs to, as `tag_encoder`."""
    return name.partition(".")[0]


def init_tag_vectors(model: MagnetoPreTrainedModel, processor: MagnetoProcessor, file: str, seed: int) -> str:
    """Start the tag embedder from word vectors in the text format of word2vec or GloVe.

    A tag of several words is the mean of the words that the file knows. Vectors of another width are projected by a
    random orthogonal matrix, which keeps their angles as well as d_model dimensions can, and all are scaled to the
    spread that new embeddings have.

    Args:
        model: A newly made model; changed in place.
        processor: The new model's.
        file: Lines of a word and its numbers, separated by blanks; a first line of two numbers, as word2vec writes it,
            is passed over, and the next says how many numbers there are, so later words may have blanks in them; may
            be gzipped (`.gz`).
        seed: Of the projection.

    Returns:
        How many tags the file covers, for people.

    Raises:
        UserError: The file cannot be read, or a line is not as expected; the message names the line.
    """
    words = {tag: [tag, *tag.split()] for tag in processor.vocabulary}
    vectors = _read_vectors(Path(file), wanted={word for names in words.values() for word in names})
    found = {}
    for tag, names in words.items():
        if tag in vectors:  # also "new_york", which is "new york" to us
            found[tag] = vectors[tag]
        elif parts := [vectors[word] for word in names[1:] if word in vectors]:
            found[tag] = torch.stack(parts).mean(0)
    if not found:
        raise UserError(f"tag_vectors {file!r} knows none of the {len(words)} tags")

    embedding = model.get_input_embeddings().weight
    table = torch.stack(list(found.values()))  # (known tags, width of the file)
    if table.shape[1] != embedding.shape[1]:
        generator = torch.Generator().manual_seed(seed)
        projection = torch.empty(table.shape[1], embedding.shape[1])
        table = table @ torch.nn.init.orthogonal_(projection, generator=generator)
    table = table / table.std().clamp(min=1e-12)
    vocabulary = processor.tokenizer.get_vocab()
    with torch.no_grad():
        embedding[[vocabulary[tag] for tag in found]] = table.to(embedding)
    return f"{file}: vectors for {len(found)} of {len(words)} tags ({len(found) / len(words):.1%})"


def _read_vectors(path: Path, wanted: set[str]) -> dict[str, torch.Tensor]:
    """The vectors of the wanted words; of two spellings of one word the first, more frequent one."""
    vectors: dict[str, torch.Tensor] = {}
    width = None
    for number, line in enumerate(_read_lines(path), 1):
        word, *numbers = line.rstrip().rsplit(" ", width or -1)  # GloVe has words with blanks in them, as ". . ."
        if number == 1 and len(numbers) == 1 and word.isdigit() and numbers[0].isdigit():
            continue
        width = width or len(numbers)
        if len(numbers) != width or not width:
            raise UserError(
                f"{path}, line {number}: {len(numbers)} numbers after the word, expected {width or 'some'}"
            )
        try:
            word = normalize_tag(word.replace("_", " "))
        except ValueError:
            continue
        if word in wanted and word not in vectors:
            try:
                vectors[word] = torch.tensor([float(value) for value in numbers])
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    return vectors


def _read_lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", errors="replace") as lines:
            yield from lines
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"tag_vectors {str(path)!r} cannot be read: {error}") from None
