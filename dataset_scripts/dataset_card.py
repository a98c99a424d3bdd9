"""The README.md of a prepared dataset, with its two figures, written from the files themselves."""

import warnings
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from matplotlib.figure import Figure
from parquet_dataset import SHARD_STEMS, features, shards

CONFIGS = {
    "default": {"train": "train", "validation": "validation", "test": "test"},
    "unlabeled": {"train": "unlabeled"},
}
COLUMNS = {
    "item_id": ("string", "the photograph's id, unique in the dataset"),
    "image": ("Image", "RGB JPEG, upright, at most {short_side} pixels on its short side"),
    "tags": ("list[string]", "candidate tags"),
    "important_tags": (
        "list[string]",
        "the important ones among `tags`, at least one; empty in `unlabeled`, where it is unknown",
    ),
}
TAGS_IN_FIGURE = 40
CHARACTERS_IN_FIGURE = 30  # of a tag; a longer one would take the room of the bars
CANDIDATE_COLOUR, IMPORTANT_COLOUR = "#9db7d5", "#1f4e8c"


@dataclass(frozen=True)
class CardText:
    """What the files cannot tell about a dataset.

    Attributes:
        name: for people.
        metadata: further YAML fields, such as the licence.
        introduction: Markdown; what this is and where it is from.
        steps: (key in the counts, what was counted) in the order of the filter.
        ending: Markdown; licence note and citation.
    """

    name: str
    metadata: dict
    introduction: str
    steps: list[tuple[str, str]]
    ending: str


@dataclass
class Statistics:
    """Counts over the labelled splits, or over `unlabeled` where there is nothing else.

    Attributes:
        labelled: whether there is ground truth.
        per_image: number of tags -> images, for candidate and for important tags.
        per_tag: tag -> images, likewise.
    """

    labelled: bool
    per_image: dict[str, Counter]
    per_tag: dict[str, Counter]


def write_card(folder: Path, text: CardText, counts: dict, short_side: int | None) -> None:
    """Writes README.md and figures/ into the folder of a dataset.

    Args:
        folder: holds the shards.
        text: what the files cannot tell.
        counts: of the filter; `splits` among them, not all of them empty.
        short_side: limit of the photographs in pixels; None if there are none.
    """
    statistics = _count_tags(folder, counts["splits"])
    (folder / "figures").mkdir(exist_ok=True)
    _draw_tags_per_image(statistics, folder / "figures/tags_per_image.png")
    _draw_class_balance(statistics, folder / "figures/class_balance.png")

    data = _card_data(folder, text, counts, with_images=short_side is not None)
    body = _body(text, counts, statistics, short_side)
    DatasetCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / "README.md")


def _card_data(folder: Path, text: CardText, counts: dict, with_images: bool) -> DatasetCardData:
    data = DatasetCardData(
        pretty_name=text.name,
        task_categories=["zero-shot-image-classification"],
        tags=["extractive-tags-summarization", "magneto"],
        size_categories=[_size_category(sum(counts["splits"].values()))],
        **text.metadata,
    )
    configs = _configs(counts["splits"])
    infos = {}
    for config, splits in configs.items():
        sizes, download_size = SplitDict(), 0
        for split, ours in splits.items():
            files = shards(folder, ours)
            download_size += sum(file.stat().st_size for file in files)
            num_bytes = sum(_uncompressed_bytes(file) for file in files)
            sizes.add(SplitInfo(split, num_bytes=num_bytes, num_examples=counts["splits"][ours]))
        infos[config] = DatasetInfo(
            features=features(with_images),
            splits=sizes,
            download_size=download_size,
            dataset_size=sum(size.num_bytes for size in sizes.values()),
        )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    data["configs"] = [
        {
            "config_name": config,
            "data_files": [
                {"split": split, "path": f"{SHARD_STEMS[ours]}-*.parquet"} for split, ours in splits.items()
            ],
        }
        for config, splits in configs.items()
    ]
    return data


def _configs(rows: dict[str, int]) -> dict[str, dict[str, str]]:
    """Those of `CONFIGS`, and of their splits, that have rows."""
    configs = {
        config: {split: ours for split, ours in splits.items() if rows[ours]} for config, splits in CONFIGS.items()
    }
    return {config: splits for config, splits in configs.items() if splits}


def _uncompressed_bytes(file: Path) -> int:
    metadata = pq.read_metadata(file)
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _size_category(rows: int) -> str:
    categories = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")
    return categories[bisect([1_000, 10_000, 100_000, 1_000_000], rows)]


def _count_tags(folder: Path, rows: dict[str, int]) -> Statistics:
    configs = _configs(rows)
    labelled = "default" in configs
    statistics = Statistics(
        labelled,
        {column: Counter() for column in ("tags", "important_tags")},
        {column: Counter() for column in ("tags", "important_tags")},
    )
    for split in configs["default" if labelled else "unlabeled"].values():
        for shard in shards(folder, split):
            with pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(20_000, columns=["tags", "important_tags"]):
                    for column in ("tags", "important_tags"):
                        values = batch.column(column)
                        for counter, array in (
                            (statistics.per_image[column], pc.list_value_length(values)),
                            (statistics.per_tag[column], values.flatten()),
                        ):
                            for entry in pc.value_counts(array).to_pylist():
                                counter[entry["values"]] += entry["counts"]
    return statistics


def _draw_tags_per_image(statistics: Statistics, path: Path) -> None:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    bars = [("tags", "candidate tags", CANDIDATE_COLOUR, 0)]
    if statistics.labelled:
        bars = [
            ("tags", "candidate tags", CANDIDATE_COLOUR, -0.2),
            ("important_tags", "important tags", IMPORTANT_COLOUR, 0.2),
        ]
    for column, label, colour, shift in bars:
        counter = statistics.per_image[column]
        positions = [number + shift for number in counter]
        axes.bar(positions, counter.values(), width=0.4, color=colour, label=label)
    axes.set(xlabel="tags of an image", ylabel="images")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)  # covers no bar
    figure.savefig(path, dpi=120)


def _draw_class_balance(statistics: Statistics, path: Path) -> None:
    tagged, important = statistics.per_tag["tags"], statistics.per_tag["important_tags"]
    # By count, then by name: the picture must not depend on the order of the rows.
    shown = sorted(tagged, key=lambda tag: (-tagged[tag], tag))[:TAGS_IN_FIGURE][::-1]
    figure = Figure(figsize=(7, 1.3 + 0.19 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))  # not the labels: two long tags may be shortened to the same
    axes.barh(places, [tagged[tag] for tag in shown], color=CANDIDATE_COLOUR, label="candidate")
    if statistics.labelled:
        axes.barh(places, [important[tag] for tag in shown], color=IMPORTANT_COLOUR, label="important")
    axes.set_yticks(places, map(_label, shown))
    axes.set(xlabel="images")
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=120)
    # Matplotlib warns of every character that its font lacks, several times.
    if any("missing from font" in str(warning.message) for warning in caught):
        print(f"{path.name}: its font lacks some characters of the tags, which are boxes there")
    for warning in caught:
        if "missing from font" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _label(tag: str) -> str:
    if len(tag) > CHARACTERS_IN_FIGURE:
        tag = tag[: CHARACTERS_IN_FIGURE - 1].rstrip() + "…"
    return tag.replace("$", r"\$")  # what stands between two of them is TeX to Matplotlib


def _body(text: CardText, counts: dict, statistics: Statistics, short_side: int | None) -> str:
    columns = [
        f"| `{name}` | {column_type} | {meaning.format(short_side=short_side)} |"
        for name, (column_type, meaning) in COLUMNS.items()
        if name != "image" or short_side is not None
    ]
    steps = [f"| {meaning} | {_show(counts[key])} |" for key, meaning in text.steps]
    if short_side is not None:
        steps.append(f"| left out: photograph missing | {counts['missing_images']:,} |")
        steps.append(f"| left out: photograph unreadable | {counts['unreadable_images']:,} |")
    splits = [f"| {name} | {rows:,} |" for name, rows in counts["splits"].items()]
    configs = _configs(counts["splits"])
    usage, unlabeled = [], ""
    if "default" in configs:
        usage.append(f'dataset = load_dataset("PATH OR HUB ID")  # {", ".join(configs["default"])}')
    if "unlabeled" in configs:
        usage.append('unlabeled = load_dataset("PATH OR HUB ID", "unlabeled", split="train")')
        unlabeled = """`unlabeled` is a configuration of its own (its split is called `train`): rows with tags whose
ground truth is unknown or unusable, for unsupervised pre-training.

"""
    tags, important = (sum(statistics.per_tag[c].values()) for c in ("tags", "important_tags"))
    images = sum(statistics.per_image["tags"].values())
    num_tags = len(statistics.per_tag["tags"])
    shown = f"The {TAGS_IN_FIGURE} most frequent of the {num_tags:,} tags" if num_tags > TAGS_IN_FIGURE else "The tags"
    kind, of_important, in_figure = "image", "", "a candidate for"
    if statistics.labelled:
        kind, in_figure = "labelled image", "a candidate for, and important in"
        verb = "is" if important == 1 else "are"
        of_important = f"; {important:,} of them ({important / tags:.1%}) {verb} important"
    have = "has" if images == 1 else "have"
    return (
        f"""# {text.name}

{text.introduction}

```python
from datasets import load_dataset

{chr(10).join(usage)}
```

| column | type | meaning |
|---|---|---|
{chr(10).join(columns)}

| split | rows |
|---|---|
{chr(10).join(splits)}

{unlabeled}## How it was made

| step | images |
|---|---|
{chr(10).join(steps)}

## Tags

{_count(images, kind)} {have} {_count(tags, "candidate tag")}, {tags / images:.2f} each, out of a
vocabulary of {num_tags:,}{of_important}.

![Tags per image](figures/tags_per_image.png)

{shown}, by the number of images that they are {in_figure}:

![Class balance](figures/class_balance.png)

{text.ending}""".rstrip()
        + "\n"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _show(value: float) -> str:
    return f"{value:.6f}" if isinstance(value, float) else f"{value:,}"
