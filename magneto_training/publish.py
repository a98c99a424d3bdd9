"""Publish a trained folder on the Hugging Face Hub: python -m magneto_training.publish DIR USER/NAME [--dry_run]"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from random import Random

from datasets import Dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import AutoConfig

from modeling_magneto.processing_magneto import upright_rgb

from .arguments import CommandParser, RowArguments, UsageError, UserError, user_errors_in_one_line
from .initialization import load_source
from .model_card import name_model
from .prediction import load_model
from .tag_data import check_columns, checked_split, find_split, load_tag_dataset

# Everything else stays at home: checkpoints, logs, the state of the training, and above all pickles.
PUBLISHED_FILES = (
    "README.md",
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "model.onnx",
    "model.onnx.data",
    "*_magneto.py",
    "handler.py",
    "requirements.txt",
    "metrics.json",
    "training_curves.png",
    "calibration.png",
)
WIDGET_FILES = "widget/*.jpg"
WIDGET_SIZE = 512  # short side of the published photographs, in pixels


def files_to_publish(folder: Path, repo_id: str, widget_rows: Iterable[dict] = ()) -> dict[str, Path | bytes]:
    """What a published model consists of.

    Args:
        folder: A trained folder; it stays as it is.
        repo_id: `user/name`, by which the published card calls the model.
        widget_rows: Checked rows with photographs, to be the examples on the model's page.

    Returns:
        By its path in the repository, each file, or the content that differs from the folder's file.

    Raises:
        UserError: The folder lacks its card, or code that its configuration names.
    """
    paths = {path.relative_to(folder).as_posix() for pattern in PUBLISHED_FILES for path in folder.glob(pattern)}
    files: dict[str, Path | bytes] = {path: folder / path for path in sorted(paths) if (folder / path).is_file()}
    if "README.md" not in files:
        raise UserError(f"{str(folder)!r} has no README.md, expected the card that training writes")
    config = AutoConfig.from_pretrained(folder)
    code = [f"{name.partition('.')[0]}.py" for name in (getattr(config, "auto_map", None) or {}).values()]
    if getattr(config, "custom_pipelines", None):
        code += ["pipeline_magneto.py", "handler.py"]
    if missing := sorted(set(code) - files.keys()):
        raise UserError(f"{str(folder)!r} lacks {', '.join(missing)}, expected the code that training writes")
    card = ModelCard.load(folder / "README.md")
    name_model(card, repo_id)
    examples = []
    for number, row in enumerate(widget_rows, start=1):
        path = f"widget/example_{number}.jpg"
        files[path] = _jpeg(row["image"])
        labels = ", ".join(row["tags"])
        examples.append({"src": path, "candidate_labels": labels, "example_title": f"Example {number}"})
    if examples:
        card.data.widget = examples
    files["README.md"] = str(card).encode()
    return files


def choose_widget_rows(rows: Dataset, count: int) -> Dataset:
    """Some rows of a split, always the same; none with a tag that the widget, which splits at commas, cannot say."""
    tags = rows.select_columns("tags")
    order = Random(0).sample(range(len(rows)), len(rows))
    sayable = (index for index in order if not any("," in tag for tag in tags[index]["tags"] or []))
    return rows.select(list(islice(sayable, count)))


def publish(
    files: dict[str, Path | bytes],
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload files in one commit, which also takes away what an earlier upload had and these do not.

    Args:
        files: As `files_to_publish` returns them.
        repo_id: `user/name`; made if it does not exist.
        private: Whether a new repository is private; by default as the owner's settings say.
        token: A login; by default the one of this machine.
        revision: A branch, made if it does not exist; by default the main one.

    Returns:
        The address of the model.

    Raises:
        UserError: The Hub refused or cannot be reached, or the repository is public already and should not be.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id} is there already, and public")
        if revision is not None and not api.revision_exists(repo_id, revision):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        old = [path for path in api.list_repo_files(repo_id, revision=revision) if _is_published(path)]
        operations = [
            *(CommitOperationAdd(path, file) for path, file in files.items()),
            *(CommitOperationDelete(path) for path in old if path not in files),
        ]
        api.create_commit(repo_id, operations, commit_message="Upload the trained model", revision=revision)
    return str(address)


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns whatever fails between here and the Hub into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the Hub's, the network library's, a missing login
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        hint = " (to log in: hf auth login)" if refused or isinstance(error, LocalTokenNotFoundError) else ""
        raise UserError(f"{repo_id}: {' '.join(str(error).split())}{hint}") from error


def _is_published(path: str) -> bool:
    patterns = (*PUBLISHED_FILES, WIDGET_FILES)
    return any(fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def _jpeg(image: Image.Image) -> bytes:
    """A photograph as it is published: no larger than a page needs it, and without the camera's notes."""
    image = upright_rgb(image)
    scale = min(1, WIDGET_SIZE / min(image.size))
    file = io.BytesIO()
    image = image.resize([round(side * scale) for side in image.size])
    image.info = {}  # of which Pillow would write the comment, and some releases more, into the new file
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _load_widget_rows(model_dir: str, dataset_name: str, split: str, count: int) -> Dataset:
    _, processor = load_model(model_dir)
    if not processor.use_images:
        raise UserError(f"{model_dir!r} holds a tag-only model, expected one that looks at photographs")
    rows = find_split(load_tag_dataset(dataset_name), split, RowArguments(dataset_name=dataset_name))
    check_columns(rows, f"{dataset_name}, {split}", ["tags"])  # the others with the rows
    rows = choose_widget_rows(rows, count)
    return checked_split(rows, f"{dataset_name}, {split}", use_images=True, use_labels=False, skip_bad_rows=False)


def main() -> None:
    parser = CommandParser("python -m magneto_training.publish", description=__doc__.partition(":")[0])
    parser.add_argument("model_dir", metavar="DIR", help="a trained folder")
    parser.add_argument("repo_id", metavar="USER/NAME", help="what to call it on the Hub")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--widget_dataset", metavar="D", help="publish photographs of this dataset as examples")
    parser.add_argument("--widget_split", default="validation", help="the split to take them from")
    parser.add_argument("--widget_images", type=int, default=3, help="how many")
    parser.add_argument("--dry_run", action="store_true", help="list what would be uploaded, and upload nothing")
    with user_errors_in_one_line("publish"):
        args = parser.parse_args()
        if args.repo_id.count("/") != 1:
            raise UsageError(f"the id is {args.repo_id!r}, expected user/name")
        try:
            validate_repo_id(args.repo_id)
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from None
        if not Path(args.model_dir).is_dir():
            raise UserError(f"{args.model_dir!r} is no folder, expected a trained one")
        load_source(args.model_dir)
        if args.widget_images < 0:
            raise UsageError(f"widget_images is {args.widget_images}, expected at least 0")
        rows = []
        if args.widget_dataset is not None:
            rows = _load_widget_rows(args.model_dir, args.widget_dataset, args.widget_split, args.widget_images)
        files = files_to_publish(Path(args.model_dir), args.repo_id, rows)
        sizes = {path: len(file) if isinstance(file, bytes) else file.stat().st_size for path, file in files.items()}
        for path, size in sizes.items():
            print(f"{size:>13,}  {path}")
        print(f"{sum(sizes.values()):>13,}  bytes in {len(files)} files")
        if args.dry_run:
            print("nothing was uploaded")
        else:
            print(f"published: {publish(files, args.repo_id, args.private or None)}")


if __name__ == "__main__":
    main()
