"""Does a text become the right prompt in the base's tokens, whole in its frame, and is every cut counted?"""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minipeft.default_base import train_tokenizer
from minipeft.errors import InputError
from minipeft.prompts import ANSWER, Prompts, encode_task, label_token
from minipeft.tasks.task import Example, Task

LONG = "so many words that they do not all fit into the base, one after another, until the end"


def make_task(labels=("yes", "no"), multi_label=False):
    rows = {
        "train": [("ann", "t1", "I like it", "yes"), ("ann", "t2", LONG, "no"), ("bob", "t1", "I like it", "no")],
        "val": [("ann", "t3", "Grüße, 你好!", "yes")],
        "test": [("bob", "t2", LONG, "yes"), ("bob", "t4", "x", "no")],
    }
    splits = [{user: [Example(u, i, text, (label,)) for u, i, text, label in rows[name] if u == user]
               for user in ("ann", "bob")} for name in rows]  # fmt: skip
    return Task("moods", "Do they like it?", tuple(labels), multi_label, *splits)


def foreign_tokenizer():
    """Byte-level BPE that knows nothing of our tokens, as any other base has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator([LONG, "Do they like it? Text: I like it Label: yes no"], trainer)
    return tokenizer


def test_a_base_of_our_own_gets_text_and_answer():
    task, tokenizer = make_task(), train_tokenizer(make_task())
    encoded = encode_task(task, tokenizer, 512)
    answer, yes, no = (tokenizer.token_to_id(token) for token in (ANSWER, label_token("yes"), label_token("no")))
    assert encoded.labels.labels == [(yes,), (no,)] and encoded.num_cut == 0
    for question, text in [(encoded.train["ann"][0], "I like it"), (encoded.val["ann"][0], "Grüße, 你好!")]:
        assert question.prompt[-1] == answer and answer not in question.prompt[:-1]
        assert tokenizer.decode(question.prompt[:-1]).strip() == text


def test_another_base_gets_the_instruction():
    task, tokenizer = make_task(), foreign_tokenizer()
    encoded = encode_task(task, tokenizer, 512)
    assert [tokenizer.decode(label) for label in encoded.labels.labels] == [" yes", " no"]
    assert tokenizer.decode(encoded.val["ann"][0].prompt) == "Do they like it? Text: Grüße, 你好! Label:"


def test_what_the_tokenizer_puts_before_a_text_comes_first():
    """A Llama expects its BOS; an EOS after the text would end the prompt too early. An encoder wants both."""
    task, tokenizer = make_task(), foreign_tokenizer()
    plain = encode_task(task, tokenizer, 512)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    first, last = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    special = [("<s>", first), ("</s>", last)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    encoded, frame = encode_task(task, tokenizer, 512), encode_task(task, tokenizer, 512, speaks=False)
    for one, other, framed in zip(plain.train["ann"], encoded.train["ann"], frame.train["ann"]):
        assert other.prompt == (first, *one.prompt) and last not in other.prompt
        assert framed.prompt[0] == first and framed.prompt[-1] == last and framed.label == one.label
    assert tokenizer.decode(frame.val["ann"][0].prompt[1:-1]) == "Grüße, 你好!"
    assert [len(q.prompt) for q in encode_task(task, tokenizer, 9, speaks=False).train["ann"]] == [5, 9]


@pytest.mark.parametrize("make_tokenizer", [lambda: train_tokenizer(make_task()), foreign_tokenizer],
                         ids=["own", "foreign"])  # fmt: skip
def test_examples_keep_their_order_and_labels(make_tokenizer):
    encoded = encode_task(make_task(), make_tokenizer(), 512)
    labels = lambda split: {user: [q.label for q in questions] for user, questions in split.items()}  # noqa: E731
    assert labels(encoded.train) == {"ann": [0, 1], "bob": [1]}
    assert labels(encoded.val) == {"ann": [0], "bob": []}
    assert labels(encoded.test) == {"ann": [], "bob": [0, 1]}
    assert encoded.train["ann"][0].prompt == encoded.train["bob"][0].prompt  # the same text
    assert encoded.train["ann"][1].prompt == encoded.test["bob"][0].prompt


@pytest.mark.parametrize("make_tokenizer, frame", [(lambda: train_tokenizer(make_task()), ("", "")),
                                                   (foreign_tokenizer, ("Do they like it? Text: ", " Label:"))],
                         ids=["own", "foreign"])  # fmt: skip
def test_long_texts_are_cut_at_their_end_and_counted_and_the_frame_is_whole(make_tokenizer, frame):
    task, tokenizer = make_task(), make_tokenizer()
    whole = encode_task(task, tokenizer, 512)
    longest_label = int(whole.labels.lengths.max())
    full = len(whole.train["ann"][1].prompt) + longest_label
    assert encode_task(task, tokenizer, full).num_cut == 0
    cut = encode_task(task, tokenizer, full - 4)
    assert cut.num_cut == 2  # the long text, of ann and of bob
    assert cut.train["ann"][0] == whole.train["ann"][0]
    question = cut.train["ann"][1]
    assert len(question.prompt) + longest_label == full - 4
    before, after = frame
    text = tokenizer.decode(question.prompt)
    assert text.startswith(before) and text.endswith(after)
    kept = text[len(before) : len(text) - len(after)].strip()
    assert LONG.startswith(kept) and 20 < len(kept) < len(LONG)
    if not before:
        assert question.prompt[-1] == tokenizer.token_to_id(ANSWER)


def test_what_cannot_be_asked_is_refused():
    own = train_tokenizer(make_task())
    with pytest.raises(InputError, match="task 'moods' is multi-label"):
        encode_task(make_task(multi_label=True), own, 512)
    with pytest.raises(InputError, match="made for another task: it has no token for label 'maybe'"):
        encode_task(make_task(("yes", "no", "maybe")), own, 512)
    with pytest.raises(InputError, match="instruction of task 'moods' leaves no room for text in 12 positions"):
        encode_task(make_task(), foreign_tokenizer(), 12)
    with pytest.raises(InputError, match="cannot be told apart"):
        encode_task(make_task(("yes", "no", "no.")), foreign_tokenizer(), 512)


def test_a_decoders_labels_are_closed_where_one_begins_another():
    """As "answer" and "answer_overans-sway" of a task of PEFT-U's do."""
    task, tokenizer = make_task(("yes", "no", "no no")), foreign_tokenizer()
    encoded = encode_task(task, tokenizer, 512)
    assert [tokenizer.decode(label) for label in encoded.labels.labels] == [" yes.", " no.", " no no."]


def test_a_users_text_cannot_speak_in_special_tokens():
    task = make_task()
    tokenizer = train_tokenizer(task)
    forged = replace(task.train["ann"][0], text=f"{ANSWER} {label_token('yes')} I like it")
    encoded = encode_task(replace(task, train={**task.train, "ann": [forged]}), tokenizer, 512)
    special = {tokenizer.token_to_id(token) for token in (ANSWER, label_token("yes"), label_token("no"))}
    prompt = encoded.train["ann"][0].prompt
    assert special.isdisjoint(prompt[:-1]) and prompt[-1] == tokenizer.token_to_id(ANSWER)


@pytest.mark.parametrize("speaks", [True, False])
def test_virtual_tokens_take_positions_from_the_text(speaks):
    task, tokenizer = make_task(), foreign_tokenizer()
    prompts = Prompts(task.header, tokenizer, 64, speaks)
    spoken = int(prompts.labels.lengths.max()) if speaks else 0
    whole, was_cut = prompts.question(LONG)
    free = 64 - len(whole.prompt) - spoken
    assert not was_cut and prompts.question(LONG, virtual=free) == (whole, False)
    question, was_cut = prompts.question(LONG, virtual=free + 3)
    assert was_cut and len(question.prompt) == len(whole.prompt) - 3
    assert question.prompt[: len(question.prompt) - len(prompts.after)] == whole.prompt[: len(question.prompt) - len(
        prompts.after)]  # fmt: skip
    assert prompts.encode(task, free + 3).num_cut == 2 and prompts.encode(task, free).num_cut == 0
    with pytest.raises(InputError, match="leaves no room for text in 64 positions beside 64 virtual tokens"):
        prompts.question(LONG, virtual=64)


def test_a_t5_reads_the_frame_closed_and_writes_closed_labels_of_any_beginning():
    """What closes a text also closes a label, so none can be the beginning of another."""
    task, tokenizer = make_task(("yes", "no", "no no")), foreign_tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    last = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", last)])
    prompts = Prompts(task.header, tokenizer, None, start=7)
    assert prompts.labels.start == 7 and [label[-1] for label in prompts.labels.labels] == [last] * 3
    assert [tokenizer.decode(label[:-1]) for label in prompts.labels.labels] == ["yes", "no", "no no"]
    question, was_cut = prompts.question(LONG * 50, label=2)
    assert not was_cut and question.label == 2 and question.prompt[-1] == last and question.prompt.count(last) == 1
    assert tokenizer.decode(question.prompt[:-1]) == f"Do they like it? Text: {LONG * 50} Label:"


def several(*labels):
    task = make_task(("anger", "fear", "joy"), multi_label=True)
    given = {"train": labels, "val": labels[:1], "test": labels[1:2]}
    splits = [{"ann": [Example("ann", f"{name}{i}", "x", label) for i, label in enumerate(given[name])]}
              for name in given]  # fmt: skip
    return replace(task, train=splits[0], val=splits[1], test=splits[2])


def test_a_language_model_answers_with_label_sets_none_of_which_begins_another():
    sets = [("anger",), ("anger", "fear"), ("fear", "joy")]
    task, tokenizer = several(*sets), foreign_tokenizer()
    encoded = Prompts(task.header, tokenizer, 512, sets=sets).encode(task)
    assert [tokenizer.decode(label) for label in encoded.labels.labels] == [" anger.", " anger, fear.", " fear, joy."]
    assert [q.label for q in encoded.train["ann"]] == [0, 1, 2]
    with pytest.raises(InputError, match="label set joy is none of those"):
        Prompts(task.header, tokenizer, 512, sets=sets).number(("joy",))


def test_an_encoder_answers_with_any_labels():
    task = several(("anger", "joy"), ("fear",))
    encoded = Prompts(task.header, foreign_tokenizer(), 512, speaks=False, sets=[]).encode(task)
    assert encoded.labels.num_answers == 8 and [q.label for q in encoded.train["ann"]] == [0b101, 0b010]
    with pytest.raises(InputError, match="multi-label"):
        Prompts(task.header, foreign_tokenizer(), 512)
    with pytest.raises(InputError, match="a base of our own says one label"):
        Prompts(task.header, train_tokenizer(task), 512, sets=[("joy",)])
