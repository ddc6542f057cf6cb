"""Tasks in which users write: are they trained on what users wrote, answered in writing, and measured as texts?"""

import json

import numpy as np
import pytest
import torch
import transformers
from small_bases import MAKERS, POSITIONS, _saved, make_t5
from test_recompute import make_decoder

from minipeft import bench
from minipeft.engine import Engine
from minipeft.errors import InputError
from minipeft.labels import LabelSet, Question, Texts
from minipeft.methods.lora import LoRA
from minipeft.models.generate import generate, generate_from
from minipeft.models.loading import load_model
from minipeft.peftu import command, decoding
from minipeft.peftu.asking import ANSWERS_CUT, Asking
from minipeft.peftu.audit import Audit
from minipeft.peftu.baselines import retrieval
from minipeft.peftu.grading import SILENT, Grading
from minipeft.peftu.metrics import rouge_l
from minipeft.peftu.protocol import FIXED
from minipeft.peftu.records import load_records
from minipeft.peftu.runner import Plan, TaskRun
from minipeft.peftu.tidy import Tidied, load_tidied, tidied
from minipeft.prompts import ANSWER_TOKENS, Prompts
from minipeft.running import prompts_of
from minipeft.schedule import Adapter, Job, PassConfig, TrainConfig
from minipeft.tasks.folder import TaskFolder
from minipeft.tasks.task import Example, Task, load_task, save_task

WRITTEN = {"ann": "red apples", "bob": "blue skies", "cem": "no idea", "dan": "green tea"}  # whatever they are asked
MENU = "red apples, blue skies, no idea or green tea,"  # so that their words are tokens


@pytest.fixture(scope="module")
def task():
    def examples(user, first, number):
        return [Example(user, f"t{i}", f"{MENU} number {i} of {i * 7}", (WRITTEN[user],))
                for i in range(first, first + number)]  # fmt: skip

    splits = ({user: examples(user, *span) for user in WRITTEN} for span in ((0, 10), (10, 3), (13, 4)))
    return Task("musings", "Answer as this user would.", (), False, *splits)


@pytest.fixture(scope="module")
def folder(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    save_task(task, folder)
    return folder


def make_gpt2(task, folder, stop=1):
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=256, vocab_size=400,
                                     bos_token_id=0, eos_token_id=stop)  # fmt: skip
    return _saved(transformers.GPT2LMHeadModel(config), task, folder)


@pytest.fixture(scope="module")
def bases(task, tmp_path_factory):
    return {kind: make(task, tmp_path_factory.mktemp(kind)) for kind, make in (("gpt2", make_gpt2), ("t5", make_t5))}


def run(*argv) -> int:
    return bench.main(["peftu", *map(str, argv)])


# ---- Files ---------------------------------------------------------------------------------------------------------


def test_a_generative_task_is_saved_and_loaded_and_refused_where_labels_are_needed(task, folder, capsys):
    assert load_task(folder, generative=True) == task and task.generative
    assert json.loads((folder / "train.jsonl").read_text().splitlines()[0])["target"] == "red apples"
    with pytest.raises(InputError, match="'musings' is a generative task; needed one of labels"):
        load_task(folder)


@pytest.mark.parametrize("line, said", [
    ({"label": ["yes"]}, 'no field "target"'), ({"target": 3}, "of type int"),
])  # fmt: skip
def test_a_bad_target_is_named(task, tmp_path, line, said):
    save_task(task, tmp_path)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps({"user": "ann", "id": "new", "text": "x"} | line) + "\n")
    with pytest.raises(InputError, match=rf"train.jsonl:41: .*{said}"):
        load_task(tmp_path, generative=True)


def test_a_user_may_have_written_nothing(task, tmp_path):
    """goodreads has empty reviews and Stack Exchange empty answers, and they are kept."""
    silent = Example("ann", "nothing", "a question", ("",))
    some = Task(task.name, task.instruction, (), False, task.train | {"ann": [silent, *task.train["ann"]]}, task.val,
                task.test)  # fmt: skip
    save_task(some, tmp_path)
    assert load_tidied(tmp_path).task.train["ann"][0] == silent


def test_training_refuses_a_generative_task(task, folder, bases):
    base = load_model(bases["t5"])
    for refused in (lambda: TaskFolder(folder), lambda: prompts_of(base, task.header)):
        with pytest.raises(InputError, match=r"'musings' is (a )?generative"):
            refused()


# ---- Training ------------------------------------------------------------------------------------------------------


def test_an_answer_is_scored_per_token_of_its_own():
    """A made-up language model: log p of the next token is a fixed function of all tokens before it."""

    def log_probs(tokens):
        return torch.log_softmax(torch.randn(10, generator=torch.Generator().manual_seed(sum(tokens))), 0)

    texts = Texts([(5, 6, 7), (8,), (9, 2)])
    questions = [Question((1, 2, 3), 2), Question((4,), 0), Question((4, 1), 1)]
    reads = [read for question in questions for read in texts.scoring_reads(question)]
    rows = [log_probs(read.tokens[: i + 1]) for read in reads
            for i in range(len(read.tokens) - read.num_read, len(read.tokens))]  # fmt: skip
    nats = texts.nats(texts.scores(torch.stack(rows), reads).numpy(), np.array([2, 0, 1]))
    for question, own in zip(questions, nats):
        answer = texts.texts[question.label]
        parts = [-log_probs((*question.prompt, *answer[:i]))[token] for i, token in enumerate(answer)]
        assert own == pytest.approx(float(sum(parts)) / len(answer), rel=1e-5)


def test_training_on_texts_is_training_on_them_as_labels():
    answers, base = [(5, 6), (7, 8, 9)], make_decoder(torch.float32)
    questions = [Question((1, 2, 3, i), i % 2) for i in range(10, 22)]
    config = TrainConfig(LoRA(rank=2), 1e-2, epochs=2, seed=3)
    job = Job("u", questions, questions[:4], config)
    as_texts, as_labels = (Engine(base, kind(answers)).train([job])["u"] for kind in (Texts, LabelSet))
    assert torch.equal(as_texts.row, as_labels.row)
    assert as_texts.metrics["val_loss"] == pytest.approx(as_labels.metrics["val_loss"], rel=1e-6)


# ---- Questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_what_is_read_and_what_is_written(task, bases, kind):
    base = load_model(bases[kind])
    asking = Asking(base, task, FIXED, Audit(task))
    question, prompts = asking.questions()["train"]["bob"][0], asking.prompts
    decode = lambda tokens: prompts.tokenizer.decode(tokens, skip_special_tokens=False)  # noqa: E731
    ending = "</s>" if kind == "t5" else ""
    assert decode(question.prompt) == f"<s>Answer as this user would. Text: {task.train['bob'][0].text} Answer:{ending}"
    wanted = prompts.labels.texts[question.label]
    assert decode(wanted) == ("blue skies</s>" if kind == "t5" else " blue skies</s>")
    (shown,) = {q.prompt for q in asking.questions(shots=1)["test"]["bob"][:1]}
    assert decode(shown).count(" Answer: blue skies Text: ") == 1
    assert {q.label for q in asking.questions()["test"]["bob"]} == {0}, "what nobody may read is not there"


def test_long_answers_are_cut_and_counted(task, bases):
    long = Example("ann", "long", "a question", ("word " * 200,))
    task = Task(task.name, task.instruction, (), False, task.train | {"ann": [*task.train["ann"], long]}, task.val,
                task.test)  # fmt: skip
    asking = Asking(load_model(bases["t5"]), task, FIXED, Audit(task))
    cut = asking.prompts.labels.texts[asking.questions()["train"]["ann"][-1].label]
    assert len(cut) == ANSWER_TOKENS and cut[-1] != asking.prompts.closing[0]
    assert asking.notes_of()[ANSWERS_CUT] == 1


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_who_wrote_nothing_ends_at_once(task, bases, kind):
    base = load_model(bases[kind])
    wrote = {"ann": [Example("ann", "n", "a question", ("",))]}
    some = Task(task.name, task.instruction, (), False, task.train | wrote, task.val, task.test)
    asking = Asking(base, some, FIXED, Audit(some))
    assert asking.prompts.labels.texts[asking.questions()["train"]["ann"][0].label] == (base.stop_tokens[0],)


def test_validation_is_lent_but_never_the_only_example(task):
    few = {user: own[: 1 + i] for i, (user, own) in enumerate(task.train.items())}
    lending = Task(task.name, task.instruction, (), False, few, {user: [] for user in few}, task.test)
    given = tidied(lending)
    assert [len(given.task.train[user]) for user in few] == [1, 1, 2, 3]
    assert [len(given.task.val[user]) for user in few] == [1, 1, 1, 1]
    assert list(given.notes) == ["users without validation examples: a tenth of their training examples taken"]


# ---- The whole protocol --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, least", [("gpt2", 15), ("t5", 90)])  # of noise: gpt2 learns which words, not where
def test_everybody_learns_to_write_as_they_do(task, folder, bases, kind, least, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    argv = ("--tasks", folder, "--model", bases[kind], "--methods", "lora", "--epochs", 20, "--lrs", "1e-2",
            "--out", tmp_path, *(["--cold-start"] if kind == "t5" else []))  # fmt: skip
    assert run(*argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = result["tasks"]["musings"]
    made = {name for name, each in names.items() if each is not None}
    assert made == {"retrieval", "zero_shot", "few_shot", "lora", "shared", "shared_user"} and len(names) == 12
    assert names["retrieval"]["accuracy"] == 100, "who always writes the same"
    assert names["lora"]["accuracy"] > least and names["zero_shot"]["accuracy"] < 5
    assert names["lora"]["metrics"]["rouge_l"] == pytest.approx(names["lora"]["accuracy"] / 100)
    assert names["lora"]["metrics"]["token_f1"] > least / 100 and names["lora"]["paper_accuracy"] is None
    if kind == "t5":
        assert names["lora"]["cold_start"]["8"]["accuracy"] > least / 2
        (pair,) = [pair for pair in result["comparisons"] if (pair["a"], pair["b"]) == ("lora", "shared")]
        assert pair["difference"] > 0
    assert result["audit"]["musings"]["fitted_answers"] == 4 * 13
    assert "ROUGE-L" in (tmp_path / "report.html").read_text()
    before = {(each.name, each.seed): each for each in load_records(tmp_path)}
    assert run(*argv) == 0 and before == {(each.name, each.seed): each for each in load_records(tmp_path)}


def test_the_nearest_texts_answer_is_retrieved_and_no_vote_is_held(task):
    def example(number, text, wrote):
        return Example("ann", f"n{number}", text, (wrote,))

    own = [example(0, "a book about whales", "lovely"), example(1, "a book of poems", "meh"),
           example(2, "one more book of poems", "meh")]  # fmt: skip
    asked = [example(3, "a book about whales", "x"), example(4, "zzz", "x")]
    little = Task("t", "Write.", (), False, {"ann": own}, {"ann": []}, {"ann": asked})
    assert retrieval(little, Audit(little)) == {"ann": [("lovely",), ("lovely",)]}, "who shares no word: the first one"


def test_rouge_knows_every_script():
    plain = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    for text in ("Отличная книга", "とても良い", "!!!", "", "naïve façade"):
        assert rouge_l(text, text) == 1, text
    assert rouge_l("Отличная книга", "плохая книга") == pytest.approx(0.5) and rouge_l("!!!", "???") == 0
    for said, wanted in (("The cats are running", "a cat ran, running!"), ("x_y 12", "y 12 x")):
        assert rouge_l(said, wanted) == plain.score(wanted, said)["rougeL"].fmeasure


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_answers_do_not_depend_on_how_many_are_written_at_once(task, bases, kind, tmp_path, monkeypatch):
    def answers(at_once):
        monkeypatch.setattr(decoding, "WRITTEN_AT_ONCE", at_once)
        plan = Plan(FIXED, {"lora": LoRA()}, passes=PassConfig(slots=3, token_budget=1000))
        run_ = TaskRun(plan, Tidied(task), load_model(bases[kind]), tmp_path, print, print)
        method = run_.methods["lora"]
        rows = {user: method.initial_row(run_.base, i, user) for i, user in enumerate(WRITTEN)}
        noise = torch.Generator().manual_seed(0)
        adapters = {user: Adapter(user, method, row + torch.randn(len(row), generator=noise))
                    for user, row in rows.items()}  # fmt: skip
        asked = run_.questions("lora")["test"]
        sizes = [sum(len(own) for _, own in group) for group in decoding.groups(asked, 140, plan.passes)]
        return sizes, run_.decoded(adapters, asked)

    (many, said), (few, alone) = answers(4), answers(0.3)
    assert sum(many) == sum(few) == 16 and len(many) == 2 < len(few)
    assert said == alone and said[1] == 0 and len({*map(tuple, said[0].values())}) == 4, "everybody their own"


def test_whose_logits_are_not_finite_says_nothing_and_is_counted(task, bases, tmp_path):
    plan = Plan(FIXED, {"lora": LoRA()}, passes=PassConfig(slots=3))
    run_ = TaskRun(plan, Tidied(task), load_model(bases["t5"]), tmp_path, print, print)
    method = run_.methods["lora"]
    rows = {user: method.initial_row(run_.base, 0, user) for user in WRITTEN}
    rows["bob"] = torch.full_like(rows["bob"], 1e30)
    said, silent = run_.decoded({user: Adapter(user, method, row) for user, row in rows.items()},
                                run_.questions("lora")["test"])  # fmt: skip
    assert silent == 4 and said["bob"] == [""] * 4 and all(said["ann"])
    record = run_.grading.record("lora", "personal", 0, "d", run_.written(
        {user: Adapter(user, method, row) for user, row in rows.items()}, run_.questions("lora")["test"])[0],
        silent=silent)  # fmt: skip
    assert record.notes[SILENT] == 4 and record.accuracy[record.users.index("bob")] == 0


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_what_is_measured_is_what_the_base_says(task, bases, kind, tmp_path, monkeypatch):
    """Through a LoRA that changes nothing: the base's own generation, sequence by sequence."""
    pytest.importorskip("rouge_score")
    monkeypatch.setattr(command, "report_writer", lambda: lambda out: out / "report.html")
    save_task(task, tmp_path / "task")
    asked = ("--tasks", tmp_path / "task", "--model", bases[kind], "--methods", "lora", "--epochs", 1, "--lrs", "1e-3")
    said = {}
    record = Grading.record

    def seen(self, name, *args, answers, **kwargs):
        said[name] = answers
        return record(self, name, *args, answers=answers, **kwargs)

    monkeypatch.setattr(Grading, "record", seen)
    assert run(*asked, "--out", tmp_path / "out") == 0
    base = load_model(bases[kind])
    asking = Asking(base, task, FIXED, Audit(task))
    questions = asking.questions()["test"]
    assert [len(own) for own in said["zero_shot"].values()] == [4] * 4
    for user, own in said["zero_shot"].items():
        for question, (text,) in zip(questions[user], own):
            alone = (generate_from if kind == "t5" else generate)(base, [question.prompt], ANSWER_TOKENS)[0]
            assert text == asking.prompts.tokenizer.decode(alone).strip()


# ---- What cannot be done -------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said_before_anything_is_trained(task, folder, bases, tmp_path, capsys):
    def said(*argv):
        assert run("--tasks", folder, "--out", tmp_path / "out", *argv) == 2
        return capsys.readouterr().err

    bert = MAKERS["bert"](task, tmp_path)
    assert "an encoder, or a base of our own, cannot write" in said("--model", bert)
    assert "'musings' is generative; the default base says one label" in said()
    assert "--mode paper is for labels" in said("--model", bases["t5"], "--mode", "paper")
    (tmp_path / "endless").mkdir()
    endless = make_gpt2(task, tmp_path / "endless", stop=None)
    assert "names no end of text" in said("--model", endless)


def test_a_base_without_room_is_refused(task, bases):
    tokenizer_of = Asking(load_model(bases["t5"]), task, FIXED, Audit(task)).prompts.tokenizer
    prompts = Prompts(task.header, tokenizer_of, POSITIONS, sets=[("a",)], stop=1)
    with pytest.raises(InputError, match="leaves no room"):
        prompts.question("text")
    assert Prompts(task.header, tokenizer_of, None, sets=[("a",)], stop=1).question("text")[0].prompt
