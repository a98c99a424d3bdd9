"""A frozen backbone's feature maps, computed once and read from disk in every epoch and every run (--cached_views).

A frozen backbone makes the same of a photograph in every epoch; only the augmentation differs. So it is run once over
a number of augmented views of each photograph, and training mixes two of them at each turn.

    FEATURE_CACHE_DIR/<fingerprint>/view-<view>-<first row>.safetensors    {"features": (rows, h, w, C) float16}

The fingerprint is of the photographs, the transform, the backbone and its weights: whatever run has the same of all
four finds the files of the others, whatever its seed.
"""

import functools
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_magneto import MagnetoPreTrainedModel, MagnetoProcessor

from .arguments import MagnetoTrainingArguments, RowArguments, UserError
from .augmentation import ImageAugmentation, example_seed
from .frozen_backbone import FrozenBackbone
from .photographs import PhotographReader, undecoded
from .tag_data import DataError
from .whole_file import whole_file

FORMAT = 4  # a change of this file, of photographs.py or frozen_backbone.py that changes what is stored makes it 5
ROWS_PER_FILE = 2048
# Views are the same for every seed of training, so that runs share them.
VIEW_SEED = 0


class FeatureCache:
    """Feature maps of a split's photographs, in several views, memory-mapped.

    Args:
        files: For each view the files of its rows, each of `ROWS_PER_FILE` rows but for the last.
    """

    def __init__(self, files: Sequence[Sequence[Path]]):
        self.files = files
        self._open: dict[Path, torch.Tensor] = {}

    def __getstate__(self):
        return {"files": self.files, "_open": {}}  # a worker maps the files itself

    @property
    def num_views(self) -> int:
        return len(self.files)

    def read(self, index: int, view: int) -> torch.Tensor:
        """The feature map of one photograph, (h, w, C) float16; a view of the mapped file."""
        path = self.files[view][index // ROWS_PER_FILE]
        if path not in self._open:
            with safe_open(path, "pt") as file:
                self._open[path] = file.get_tensor("features")
        return self._open[path][index % ROWS_PER_FILE]

    def draw(self, indices: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """What training sees of some photographs at one turn: every region is one of two views', decided by the seed.

        The model attends to regions as a set. A mixture of two views, in any proportion, is a new set of regions of
        the same photograph, so a few views go as far as fresh ones in every epoch.

        Args:
            indices: B rows.
            seeds: A number of 64 bits for each.

        Returns:
            (B, C, h, w) float16, channels last in memory; where there is one view, that.
        """
        if self.num_views == 1:
            features = torch.stack([self.read(index, 0) for index in indices])
            return features.permute(0, 3, 1, 2)
        height, width, _ = self.read(indices[0], 0).shape
        numbers = _uniform_numbers(seeds, 3 + height * width)
        first = (numbers[:, 0] * self.num_views).astype(int)
        second = (first + 1 + (numbers[:, 1] * (self.num_views - 1)).astype(int)) % self.num_views
        first_views, second_views = (
            torch.stack(list(map(self.read, indices, views.tolist()))) for views in (first, second)
        )  # (B, h, w, C)
        from_first = torch.from_numpy(numbers[:, 3:] < numbers[:, 2:3]).view(-1, height, width, 1)
        return torch.where(from_first, first_views, second_views).permute(0, 3, 1, 2)


def _uniform_numbers(seeds: Sequence[int], count: int) -> np.ndarray:
    """(B, count) numbers in [0, 1): `count` of each seed's SplitMix64 (Steele et al., 2014), all at once.

    To make a generator of NumPy's for each photograph takes longer than all else that happens to its features.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = np.array(seeds, dtype=np.uint64)[:, None] + steps  # overflow is meant
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def build_feature_caches(
    model: MagnetoPreTrainedModel,
    processor: MagnetoProcessor,
    splits: dict[str, Dataset],
    data_args: RowArguments,
    training_args: MagnetoTrainingArguments,
) -> dict[str, FeatureCache]:
    """Run the backbone over the photographs of every split, as far as that has not been done before.

    `train` gets `cached_views` augmented views, or with one view what evaluation sees; the other splits get that. The
    size is announced before. Each process does its share, and an interrupted build goes on where it was. Afterwards,
    without a GPU, `training_args` asks for no workers.

    Args:
        model: With the weights it is trained with, and a frozen backbone.
        processor: The model's.
        splits: Checked rows with photographs.
        data_args: Augmentation of the photographs.
        training_args: `cached_views`, `feature_cache_dir`, and the batch size, workers and precision of the run.

    Raises:
        UserError: The disk is too small, a feature is beyond float16, or the processes do not share the folder.
    """
    state = PartialState()
    builders = {}
    for name, rows in splits.items():
        views = training_args.cached_views if name == "train" else 1
        builders[name] = _Builder(model, processor, rows, views, data_args, training_args)
    if state.is_main_process:
        _announce(builders)
    state.wait_for_everyone()
    for builder in builders.values():
        builder.build(state)
    state.wait_for_everyone()
    for builder in builders.values():
        if missing := builder.missing(builder.all_files()):
            raise UserError(
                f"{builder.folder} lacks {len(missing)} files that another process has made; "
                "expected a --feature_cache_dir that all processes share"
            )
    if training_args.device.type == "cpu":
        # What is left to do for a batch takes less time than to hand it over from another process.
        training_args.dataloader_num_workers = 0
        training_args.dataloader_persistent_workers = False
        training_args.dataloader_prefetch_factor = None
        training_args.dataloader_multiprocessing_context = None
    return {name: FeatureCache(builder.files) for name, builder in builders.items()}


class _Builder:
    """The files of one split: which there are to be, which are missing, and how they are made."""

    def __init__(
        self,
        model: MagnetoPreTrainedModel,
        processor: MagnetoProcessor,
        rows: Dataset,
        num_views: int,
        data_args: RowArguments,
        training_args: MagnetoTrainingArguments,
    ):
        self.model = model
        self.rows = rows
        self.training_args = training_args
        self.size = model.config.image_size
        augmentation = None
        if num_views > 1:
            augmentation = ImageAugmentation(self.size, data_args.min_crop_scale, data_args.auto_augment)
        self.read_photographs = PhotographReader(processor.image_processor, augmentation)
        transform = {
            "image_processor": processor.image_processor.to_dict(),
            "augmentation": None if num_views == 1 else [data_args.min_crop_scale, data_args.auto_augment],
        }
        fingerprint = [None]
        if PartialState().is_main_process:  # it reads all photographs, which one process can do for all
            fingerprint = [_fingerprint(rows, transform, model, training_args.bf16)]
        broadcast_object_list(fingerprint)
        cache_dir = Path(training_args.feature_cache_dir or Path(HF_HOME) / "magneto_features")
        self.folder = cache_dir / fingerprint[0]
        self.files = [
            [self.folder / f"view-{view:03d}-{start:09d}.safetensors" for start in range(0, len(rows), ROWS_PER_FILE)]
            for view in range(num_views)
        ]

    def all_files(self) -> list[tuple[int, int]]:
        """View and number of each file: all views of the first rows, then of the next.

        Neighbours go to different processes, and so the smaller last file of each view is not always the same one's.
        """
        return [(view, number) for number in range(len(self.files[0])) for view in range(len(self.files))]

    def missing(self, files: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the files that are not there yet, or not whole: after a crash of the machine."""
        return [(view, number) for view, number in files if not self._is_whole(view, number)]

    def damaged(self) -> list[Path]:
        """Files that are there, and to be made again."""
        paths = [self.files[view][number] for view, number in self.missing(self.all_files())]
        return [path for path in paths if path.exists()]

    def _is_whole(self, view: int, number: int) -> bool:
        try:
            with safe_open(self.files[view][number], "pt") as file:
                return file.get_slice("features").get_shape()[0] == len(self._row_numbers(number))
        except (OSError, SafetensorError):
            return False

    def num_missing_rows(self) -> int:
        return sum(len(self._row_numbers(number)) for _, number in self.missing(self.all_files()))

    def num_bytes_per_row(self) -> int:
        with torch.inference_mode():
            image = torch.zeros(1, 3, self.size, self.size, device=self.model.device)
            return 2 * self.model.base_model.image_feature_extractor.feature_map(image).numel()

    def build(self, state: PartialState) -> None:
        """Make this process's share of the missing files. Each is written when the last batch of its rows is there.

        Raises:
            UserError: A feature is beyond float16, or a file cannot be written.
        """
        # Shared out before looking: what is missing changes while the others are at work.
        share = self.missing(self.all_files()[state.process_index :: state.num_processes])
        if not share:
            return
        backbone = FrozenBackbone(self.model, self.training_args.device, self.training_args.bf16)
        in_workers = backbone.device.type == "cpu"
        batch_size = self.training_args.per_device_eval_batch_size
        # Path, rows and lock; the data loader asks for batches before it returns the ones before.
        begun: deque[tuple[Path, int, FileLock]] = deque()

        def plan_batches() -> Iterator[list[tuple[int, int]]]:
            for view, number in share:
                path, row_numbers = self.files[view][number], self._row_numbers(number)
                lock = FileLock(f"{path}.lock")  # another run may be at the same file
                lock.acquire()  # in the same order as any other run, so that none waits for ever
                if self._is_whole(view, number):
                    lock.release()
                    continue
                begun.append((path, len(row_numbers), lock))
                for start in range(0, len(row_numbers), batch_size):
                    yield [(view, row_number) for row_number in row_numbers[start : start + batch_size]]

        loader = DataLoader(
            _Views(self.rows, self.read_photographs),
            batch_sampler=plan_batches(),
            num_workers=self.training_args.dataloader_num_workers,
            collate_fn=functools.partial(self._collate, backbone if in_workers else None),
        )
        total = sum(len(self._row_numbers(number)) for _, number in share)
        hidden = not state.is_local_main_process or self.training_args.disable_tqdm
        parts: list[torch.Tensor] = []  # of the first file that is begun
        try:
            with tqdm(total=total, unit="image", desc="Caching features", disable=hidden) as progress:
                for batch in loader:
                    parts.append((batch if in_workers else backbone(batch)).to("cpu", torch.float16))
                    progress.update(len(batch))
                    path, num_rows, lock = begun[0]
                    if sum(map(len, parts)) == num_rows:
                        _write(path, torch.cat(parts))
                        parts.clear()
                        begun.popleft()
                        lock.release()
        finally:
            for _, _, lock in begun:
                lock.release()

    def _row_numbers(self, number: int) -> range:
        return range(number * ROWS_PER_FILE, min(len(self.rows), (number + 1) * ROWS_PER_FILE))

    def _collate(self, backbone: FrozenBackbone | None, photographs: list[torch.Tensor]) -> torch.Tensor:
        """A batch of photographs as tensors, and with a backbone as feature maps."""
        pixel_values = torch.stack(photographs)
        return pixel_values if backbone is None else backbone(pixel_values)


def _write(path: Path, features: torch.Tensor) -> None:
    """Write one file; `features` are (rows, C, h, w) float16."""
    features = features.permute(0, 2, 3, 1).contiguous()  # as a linear layer reads regions
    if not features.isfinite().all():
        raise UserError("cached_views: a feature of the backbone is beyond what float16 holds; train without it")
    try:
        with whole_file(path) as partial:
            save_file({"features": features}, partial)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the feature cache {path} cannot be written: {error}") from None


class _Views(torch.utils.data.Dataset):
    """Views of a split's photographs, as tensors; the index of each is (view, row)."""

    def __init__(self, rows: Dataset, read_photographs: PhotographReader):
        self.photographs = undecoded(rows.select_columns(["item_id", "image"]))
        self.read_photographs = read_photographs

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[torch.Tensor]:
        rows = self.photographs[[row_number for _, row_number in indices]]
        seeds = [example_seed(VIEW_SEED, view, row_number) for view, row_number in indices]
        tensors = self.read_photographs(rows["image"], seeds)
        for item_id, tensor in zip(rows["item_id"], tensors, strict=True):
            if tensor is None:  # when the rows were checked, it could be read
                raise DataError(f"the photograph of item_id {item_id} can no longer be read")
        return tensors


def _announce(builders: dict[str, _Builder]) -> None:
    """Say how much will be computed and written, and stop where the disk is too small for it."""
    first = next(iter(builders.values()))
    missing = {name: builder.num_missing_rows() for name, builder in builders.items()}
    num_missing, num_bytes = sum(missing.values()), first.num_bytes_per_row()
    total = sum(len(builder.rows) * len(builder.files) for builder in builders.values())
    cache_dir = first.folder.parent
    print(
        f"feature cache {cache_dir}: {total} feature maps, {total * num_bytes / 1e9:.2f} GB, "
        f"of which {num_missing} are to be computed",
        flush=True,
    )
    for builder in builders.values():
        for path in builder.damaged():
            print(f"{path} is damaged, and is made again", flush=True)
        builder.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_dir).free
    if free < num_missing * num_bytes:
        raise UserError(
            f"the feature cache needs {num_missing * num_bytes / 1e9:.2f} GB and {cache_dir} has "
            f"{free / 1e9:.2f} GB free; give another --feature_cache_dir, or fewer --cached_views"
        )


def _fingerprint(rows: Dataset, transform: dict, model: MagnetoPreTrainedModel, bf16: bool) -> str:
    """Of all that a feature map depends on."""
    digest = hashlib.sha256()
    config = model.config
    settings = [FORMAT, transform, config.backbone, config.backbone_kwargs, config.image_size, bf16, VIEW_SEED]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.base_model.image_feature_extractor.backbone.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    photographs = undecoded(rows.select_columns("image")).with_format("arrow")
    digests = photographs.map(  # kept by `datasets`: a second run need not read them again
        _digest_photographs,
        batched=True,
        fn_kwargs={"state": _state_of_files(photographs)},
        remove_columns="image",
        features=datasets.Features({"digest": datasets.Value("binary")}),
        desc="Reading photographs",
    )
    for batch in digests.with_format("arrow").iter(batch_size=10_000):
        digest.update(b"".join(batch["digest"].to_pylist()))
    return digest.hexdigest()[:32]


def _state_of_files(photographs: Dataset) -> str:
    """A digest that changes with any photograph that is a file.

    Of a struct `{bytes, path}` in a table, `datasets` does not see it. Of an archive it does.
    """
    digest = hashlib.sha256()
    for batch in photographs.iter(batch_size=1_000):
        content, paths = (pc.struct_field(batch["image"], name) for name in ("bytes", "path"))
        for path in paths.filter(pc.is_null(content)).to_pylist():
            if "://" not in path:
                status = os.stat(path)
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _digest_photographs(rows: pa.Table, state: str) -> pa.Table:
    """`state` is for `datasets` alone: what it has kept ends when a file changes."""
    digests = []
    for index in range(len(rows)):  # one at a time, which may be large
        (image,) = datasets.Image().embed_storage(rows["image"].slice(index, 1).combine_chunks()).to_pylist()
        digests.append(hashlib.sha256(image["bytes"]).digest())
    return pa.table({"digest": pa.array(digests, pa.binary())})
