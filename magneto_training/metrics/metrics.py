"""The metric of extractive tags summarization, as a module of the evaluate library."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Precision, recall and F1 (percent) of the selected tags, per image and averaged over images. Beside them the figures of
keeping every tag, and of the images that have something to remove ("reducible")."""

_INPUTS = """\
Args:
    predictions: for each image, 1 for each selected tag and 0 for the others.
    references: for each image, 1 for each important tag, 0 for the others, -100 for slots that do not count. An image
        has at least one important tag.
Returns:
    precision: mean over the images with at least one selected tag; nan if there is none.
    recall, f1: means over all images; the F1 of an image with nothing selected is 0.
    keep_all_precision, keep_all_recall, keep_all_f1: the same, with every tag selected.
    reducible_f1, keep_all_reducible_f1: F1 over the images with an unimportant tag; nan if there is none.
    num_images: the number of images, the weight of the means over all images.
    num_selected_images: the number of images with at least one selected tag, the weight of precision.
    num_reducible_images: the number of images with an unimportant tag, the weight of the figures over those.
Examples:
    >>> metric = evaluate.load("magneto_training/metrics")
    >>> results = metric.compute(predictions=[[1, 0, 0], [1]], references=[[1, 1, 0], [1]])
    >>> round(results["f1"], 2), round(results["keep_all_f1"], 2)
    (83.33, 90.0)
"""

_CITATION = """\
@article{phung2020magneto,
  title={MAGNeto: An Efficient Deep Learning Method for the Extractive Tags Summarization Problem},
  author={Phung, Hieu Trong and Vu, Anh Tuan and Nguyen, Tung Dinh and Do, Lam Thanh and Ngo, Giang Nam and
          Tran, Trung Thanh and L{\\^e}, Ngoc C.},
  year={2020}
}"""


class TagSummarization(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int8")),
                    "references": datasets.Sequence(datasets.Value("int8")),
                }
            ),
        )

    def _compute(self, predictions, references):
        image, selected, important = _flatten(predictions, references)
        num_images = len(references)

        def count(tags):
            return np.bincount(image, weights=tags, minlength=num_images)  # (images,)

        num_tags, num_important = count(np.ones_like(image)), count(important)
        if (without := np.flatnonzero(num_important == 0)).size:
            raise ValueError(f"references[{without[0]}] has no important tag, expected at least one")
        precision, recall, f1 = _scores(count(selected * important), count(selected), num_important)
        keep_all_precision, keep_all_recall, keep_all_f1 = _scores(num_important, num_tags, num_important)
        reducible = num_tags > num_important
        return {
            "precision": _percent(precision[~np.isnan(precision)]),
            "recall": _percent(recall),
            "f1": _percent(f1),
            "keep_all_precision": _percent(keep_all_precision),
            "keep_all_recall": _percent(keep_all_recall),
            "keep_all_f1": _percent(keep_all_f1),
            "reducible_f1": _percent(f1[reducible]),
            "keep_all_reducible_f1": _percent(keep_all_f1[reducible]),
            "num_images": num_images,
            "num_selected_images": int(np.count_nonzero(~np.isnan(precision))),
            "num_reducible_images": int(np.count_nonzero(reducible)),
        }


def _flatten(predictions, references):
    """Ragged lists to three flat arrays over the counting tags: image, selected (0/1), important (0/1)."""
    lengths = np.array([len(row) for row in references])
    for index, row in enumerate(predictions):
        if len(row) != lengths[index]:
            raise ValueError(f"predictions[{index}] has {len(row)} tags, references[{index}] has {lengths[index]}")
    image = np.repeat(np.arange(len(lengths)), lengths)
    selected, important = np.concatenate(predictions), np.concatenate(references)
    counts = important != -100
    return image[counts], selected[counts].astype(bool), important[counts].astype(bool)


def _scores(num_hits, num_selected, num_important):
    """Precision (nan where nothing is selected), recall and F1 of each image, in [0, 1]."""
    precision = np.divide(num_hits, num_selected, out=np.full(len(num_hits), np.nan), where=num_selected > 0)
    return precision, num_hits / num_important, 2 * num_hits / (num_selected + num_important)


def _percent(values):
    return 100 * float(values.mean()) if len(values) else float("nan")
