"""Which label did the model mean? As the published code reads decoded text.

A decoded text is split at commas; of each piece some endings are dropped, and it stands for the first label that
contains it. Right if any of them is among the true labels.

It chooses no answer where labels can be scored: `fixed` takes the label of the highest log-likelihood (labels.py). The
published reading is then applied to that label's name, so that every run has both accuracies.
"""

from collections.abc import Sequence

from minipeft.peftu.metrics import Labels

ENDINGS = (".", "'", "ing", "ed", '"', ")")  # dropped in this order, each at most once


def published_reading(decoded: str, labels: Sequence[str]) -> Labels:
    """The labels that the published code (trainer/train.py, GetPredId) hears in a decoded text, possibly none.

    Its quirks are kept: an empty text is the first label, "hateful" is "Non-hateful" because only that contains it, and
    capitals matter.
    """
    return tuple(label for piece in decoded.split(",") if (label := _lenient(piece, labels)) is not None)


def _lenient(piece: str, labels: Sequence[str]) -> str | None:
    piece = piece.strip()
    for ending in ENDINGS:
        piece = piece.removesuffix(ending)
    return next((label for label in labels if piece in label), None)


def published_right(decoded: str, truth: Labels, labels: Sequence[str]) -> bool:
    """Whether the published code counts this text as right: any label heard is among the true ones."""
    return bool({*published_reading(decoded, labels)} & {*truth})
