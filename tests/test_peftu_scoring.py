"""Does `paper` scoring answer what the published scorer answers? The last column is what that code said."""

import pytest

from minipeft.peftu.scoring import exact_reading, paper_accuracy, published_reading, published_right

TWEETEVAL, EPIC, YES = ("Hateful", "Non-hateful"), ("Ironic", "Non-ironic"), ("no", "yes")
EMOTIONS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
DISCOURSE = ("answer", "answer_overans-sway", "cant-answer-lying", "cant-answer-sincere", "shift-correct",
             "shift-dodge")  # fmt: skip
# task's labels, decoded, true labels, right?
PUBLISHED = [
    (TWEETEVAL, "", "Hateful", True),
    (TWEETEVAL, "", "Non-hateful", False),
    (TWEETEVAL, " ", "Hateful", True),
    (TWEETEVAL, " ", "Non-hateful", False),
    (TWEETEVAL, "Hateful", "Hateful", True),
    (TWEETEVAL, "Hateful", "Non-hateful", False),
    (TWEETEVAL, "hateful", "Hateful", False),
    (TWEETEVAL, "hateful", "Non-hateful", True),
    (TWEETEVAL, "Hateful.", "Hateful", True),
    (TWEETEVAL, "Hateful.", "Non-hateful", False),
    (TWEETEVAL, "Non-hateful", "Hateful", False),
    (TWEETEVAL, "Non-hateful", "Non-hateful", True),
    (TWEETEVAL, "Non-hateful.", "Hateful", False),
    (TWEETEVAL, "Non-hateful.", "Non-hateful", True),
    (TWEETEVAL, "non-hateful", "Hateful", False),
    (TWEETEVAL, "non-hateful", "Non-hateful", False),
    (TWEETEVAL, "hate", "Hateful", False),
    (TWEETEVAL, "hate", "Non-hateful", True),
    (TWEETEVAL, "Non", "Hateful", False),
    (TWEETEVAL, "Non", "Non-hateful", True),
    (TWEETEVAL, "HATEFUL", "Hateful", False),
    (TWEETEVAL, "HATEFUL", "Non-hateful", False),
    (TWEETEVAL, "Hateful tweet", "Hateful", False),
    (TWEETEVAL, "Hateful tweet", "Non-hateful", False),
    (TWEETEVAL, "Hateful, Non-hateful", "Hateful", True),
    (TWEETEVAL, "Hateful, Non-hateful", "Non-hateful", True),
    (TWEETEVAL, "Non-hateful, Hateful", "Hateful", True),
    (TWEETEVAL, "Non-hateful, Hateful", "Non-hateful", True),
    (TWEETEVAL, "maybe", "Hateful", False),
    (TWEETEVAL, "maybe", "Non-hateful", False),
    (TWEETEVAL, "maybe, Hateful", "Hateful", True),
    (TWEETEVAL, "maybe, Hateful", "Non-hateful", False),
    (TWEETEVAL, "-", "Hateful", False),
    (TWEETEVAL, "-", "Non-hateful", True),
    (TWEETEVAL, '"Hateful"', "Hateful", False),
    (TWEETEVAL, '"Hateful"', "Non-hateful", False),
    (TWEETEVAL, 'Hateful"', "Hateful", True),
    (TWEETEVAL, 'Hateful"', "Non-hateful", False),
    (TWEETEVAL, "Hateful)", "Hateful", True),
    (TWEETEVAL, "Hateful)", "Non-hateful", False),
    (TWEETEVAL, "Hateful).", "Hateful", True),
    (TWEETEVAL, "Hateful).", "Non-hateful", False),
    (TWEETEVAL, "Hateful.'", "Hateful", False),
    (TWEETEVAL, "Hateful.'", "Non-hateful", False),
    (TWEETEVAL, "Hateful..", "Hateful", False),
    (TWEETEVAL, "Hateful..", "Non-hateful", False),
    (TWEETEVAL, ", ", "Hateful", True),
    (TWEETEVAL, ", ", "Non-hateful", False),
    (TWEETEVAL, ",Hateful", "Hateful", True),
    (TWEETEVAL, ",Hateful", "Non-hateful", False),
    (TWEETEVAL, ".", "Hateful", True),
    (TWEETEVAL, ".", "Non-hateful", False),
    (TWEETEVAL, "ing", "Hateful", True),
    (TWEETEVAL, "ing", "Non-hateful", False),
    (TWEETEVAL, "Non-hatefuled", "Hateful", False),
    (TWEETEVAL, "Non-hatefuled", "Non-hateful", True),
    (EPIC, "ironic", "Ironic", False),
    (EPIC, "ironic", "Non-ironic", True),
    (EPIC, "Ironic", "Ironic", True),
    (EPIC, "Ironic", "Non-ironic", False),
    (EPIC, "Non-ironic", "Ironic", False),
    (EPIC, "Non-ironic", "Non-ironic", True),
    (EPIC, "Iron", "Ironic", True),
    (EPIC, "Iron", "Non-ironic", False),
    (EPIC, "nic", "Ironic", True),
    (EPIC, "nic", "Non-ironic", False),
    (EMOTIONS, "joy", "joy", True),
    (EMOTIONS, "joy, fear", "fear", True),
    (EMOTIONS, "anger,disgust,fear,joy,sadness,surprise", "surprise", True),
    (EMOTIONS, "joy", "fear, joy", True),
    (EMOTIONS, "disgusted", "disgust", True),
    (EMOTIONS, "surprising", "surprise", True),
    (EMOTIONS, "surprised", "surprise", True),
    (EMOTIONS, "sad", "sadness", True),
    (EMOTIONS, "happiness", "joy", False),
    (EMOTIONS, "happiness, joy", "joy", True),
    (EMOTIONS, "", "anger", True),
    (EMOTIONS, "", "fear, joy", False),
    (EMOTIONS, "e", "anger", True),
    (EMOTIONS, "e", "fear", False),
    (EMOTIONS, "s", "surprise", False),
    (EMOTIONS, "s", "disgust", True),
    (EMOTIONS, "joy fear", "joy", False),
    (EMOTIONS, "happiness", "anger", False),
    (DISCOURSE, "sway", "answer_overans-sway", True),
    (DISCOURSE, "answer", "answer", True),
    (DISCOURSE, "cant-answer", "cant-answer-lying", True),
    (DISCOURSE, "cant-answer", "cant-answer-sincere", False),
    (DISCOURSE, "lying", "cant-answer-lying", True),
    (DISCOURSE, "ly", "cant-answer-lying", True),
    (DISCOURSE, "shift", "shift-dodge", False),
    (DISCOURSE, "shift", "shift-correct", True),
    (DISCOURSE, "dodge", "shift-dodge", True),
    (DISCOURSE, "answer: shift-dodge", "shift-dodge", False),
    (DISCOURSE, "answer_overans-sway", "answer", False),
    (("0", "1", "2"), "1", "1", True),
    (("0", "1", "2"), "", "0", True),
    (("0", "1", "2"), "3", "0", False),
    (("healthy", "unhealthy"), "healthy", "healthy", True),
    (("healthy", "unhealthy"), "unhealthy", "healthy", False),
    (("healthy", "unhealthy"), "health", "unhealthy", False),
    (YES, "n", "no", True),
    (YES, "Yes", "yes", False),
    (YES, "o", "no", True),
]


@pytest.mark.parametrize(("labels", "decoded", "truth", "right"), PUBLISHED)
def test_the_published_scorer(labels, decoded, truth, right):
    assert published_right(decoded, tuple(truth.split(", ")), labels) is right


def test_what_is_heard():
    assert published_reading("", TWEETEVAL) == ("Hateful",)
    assert published_reading("hateful", TWEETEVAL) == ("Non-hateful",)
    assert published_reading("maybe, Hateful.", TWEETEVAL) == ("Hateful",)
    assert published_reading("maybe", TWEETEVAL) == ()


def test_exact_reading_takes_whole_labels_only():
    assert exact_reading("joy, anger", EMOTIONS) == ("anger", "joy")
    assert exact_reading("", EMOTIONS) == exact_reading("Joy", EMOTIONS) == exact_reading("sad", EMOTIONS) == ()


def test_answered_labels_are_scored_by_their_names():
    truths = [("Hateful",), ("Non-hateful",)]
    assert paper_accuracy(truths, truths, TWEETEVAL) == 1
    assert paper_accuracy([("Non-hateful",)] * 2, truths, TWEETEVAL) == 0.5
    assert paper_accuracy([EMOTIONS], [("joy",)], EMOTIONS) == 1  # all labels: any hit
    assert paper_accuracy([()], [("anger",)], EMOTIONS) == 1  # an empty answer reads as the first label
