"""What resume_test.py, poison_test.py and kill_training.py share: a tiny base, users, what is compared."""

from pathlib import Path

from minipeft.default_base import initialise, train_tokenizer
from minipeft.methods.lora import LoRA
from minipeft.models.classifier import Base
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import load_model, save_model
from minipeft.schedule import PassConfig, TrainConfig
from minipeft.store import Store
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import Task, save_task

CONFIG = TrainConfig(LoRA(rank=4, dropout=0.125, sites=("v", "down")), learning_rate=0.02, epochs=2, batch_size=4)
PASSES = PassConfig(slots=8, token_budget=1024, deterministic=True)
FLAGS = ("--method", "lora", "--rank", "4", "--dropout", "0.125", "--sites", "v,down", "--learning-rate", "0.02",
         "--epochs", "2", "--batch-size", "4", "--slots", "8", "--token-budget", "1024", "--deterministic")  # fmt: skip


def make_inputs(folder: Path, users: int) -> tuple[Task, Base]:
    """A task of so many users in `folder/task` and a base of random weights in `folder/base`."""
    task, _ = make_synthetic(SyntheticConfig(users=users, max_examples=40, test_examples=2, texts=200))
    save_task(task, folder / "task")
    tokenizer = train_tokenizer(task)
    config = DecoderConfig(tokenizer.get_vocab_size(), 32, 2, 2, 2, 16, 48, tied_head=True, max_positions=96)
    save_model(initialise(Decoder(config), 0), tokenizer, folder / "base")
    return task, load_model(folder / "base")


def adapters_of(folder: Path, base: Base) -> dict[str, tuple[bytes, dict]]:
    """User -> their row's bytes and their metrics, of everybody in a store: to be compared."""
    store = Store(folder)
    adapters = {user: store.get(user, base) for user in store.users()}
    return {user: (adapter.row.numpy().tobytes(), adapter.metrics) for user, adapter in adapters.items()}
