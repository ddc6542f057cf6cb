"""What one would run without minipeft: transformers and peft, one user's LoRA after another. For comparison only.

    Peft        the base loaded once, LoRA's numbers put back to a user's start, each minibatch padded to its longest
                text, the head where a label is predicted, PyTorch's fused AdamW: no work that could be left out
    Published   as PEFT-U's code trains (arXiv:2407.18078): every text padded to 512 tokens, logits at all of them. Its
                reload of the base for every user is left out

Both take the same minibatches, start values and learning rates as our engine, and return the row that it would.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.batch import Read
from minipeft.errors import InputError
from minipeft.interop.modules import modules_of
from minipeft.interop.peft import KEYS, ROOT
from minipeft.labels import Answerable
from minipeft.methods.head import Head
from minipeft.methods.lora import LoRA
from minipeft.models.classifier import Base, Classifier
from minipeft.models.decoder import Decoder
from minipeft.schedule import Job, Run

PUBLISHED_LENGTH = 512  # tokens


class Peft:
    """Hugging Face PEFT's LoRA on the folder that a base came from.

    Args:
        base:   a decoder, or an encoder with classes, read from a folder; fp32, on a CPU or GPU.
        method: a LoRA without dropout and patterns, with a head beside it on an encoder.
    Raises:
        InputError: transformers or peft are not installed, or they cannot do what is asked.
    """

    def __init__(self, base: Base, labels: Answerable, method):
        try:
            import peft
            import transformers
        except ImportError as error:
            raise InputError(f"{error.name} is not installed: pip install 'minipeft[test]'") from None
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        parts = method.parts
        lora = parts[0]
        if not (isinstance(lora, LoRA) and all(isinstance(part, Head) for part in parts[1:])):
            raise InputError(f"peers train LoRA, and a head beside it; not {method.title}")
        if lora.dropout or lora.ranks or lora.alphas or not isinstance(base, (Decoder, Classifier)):
            raise InputError("peers train a plain LoRA of a Llama's or BERT's kin")
        self.base, self.labels, self.method, self.device = base, labels, method, base.device
        self.encodes = isinstance(base, Classifier)
        modules = modules_of(base)
        paths = {site: modules[site].path for site in lora.chosen(base)}
        folder = str(base.origin.folder)
        if self.encodes:
            self.model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.model.to(self.device).eval().requires_grad_(False)
        config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.scaling == "rslora",
                                 target_modules=list(paths.values()))  # fmt: skip
        self.adapted = peft.get_peft_model(self.model, config)
        there = dict(self.adapted.named_parameters())
        self.own: dict[str, Tensor] = {}  # our names -> their parameters
        for site, path in paths.items():
            for word in ("A", "B"):
                key = f"{ROOT}{path}.{KEYS[word]}".replace(".weight", ".default.weight")
                self.own[f"{site}.{word}"] = there[key]
        if self.encodes:
            K, C = base.head_size
            for name, shape in (("head.weight", (C, K - 1)), ("head.bias", (C,))):
                self.own[name] = torch.zeros(shape, device=self.device, requires_grad=True)

    def train(self, job: Job, num_steps: int) -> Tensor:
        """The user's row [P] after so many steps of the job's plan."""
        row = self.method.initial_row(self.base, job.config.seed, job.user) if job.start is None else job.start
        with torch.no_grad():
            for name, tensor in self.method.tensors(row, self.base).items():
                self.own[name].copy_(tensor)
        config, params, run = job.config, list(self.own.values()), Run(job, 0, 0)
        optimizer = torch.optim.AdamW(params, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                      eps=config.eps, weight_decay=config.weight_decay, fused=True)  # fmt: skip
        for _ in range(num_steps):
            reads = run.minibatch(self.labels).reads
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate
            self.loss(reads).backward()
            torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.advance()
        return self.method.row({name: tensor.detach().cpu() for name, tensor in self.own.items()}, self.base)

    def loss(self, reads: Sequence[Read]) -> Tensor:
        """Mean of -log p over the minibatch's target tokens."""
        ids, mask = self._padded([read.tokens for read in reads], max(len(read.tokens) for read in reads))
        targets = torch.tensor([token for read in reads for token in read.targets], device=ids.device)
        if self.encodes:
            return F.cross_entropy(self._classes(ids, mask), targets)
        # Padding lies on the right, where causal rows do not look: no mask, so that the fastest attention serves.
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        ends, width = [len(read.tokens) for read in reads], ids.shape[1]
        rows = [i * width + j for i, (end, read) in enumerate(zip(ends, reads))
                for j in range(end - read.num_read, end)]  # fmt: skip
        read_rows = hidden.flatten(0, 1)[torch.tensor(rows, device=ids.device)]
        return F.cross_entropy(self.model.lm_head(read_rows).float(), targets)

    def _classes(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[n, C] logits of the texts' means."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return F.linear(mean, self.own["head.weight"], self.own["head.bias"])

    def _padded(self, texts: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
        """ids and mask, int64 [n, width]."""
        fill = self.model.config.pad_token_id or 0
        ids = [[*text, *[fill] * (width - len(text))] for text in texts]
        mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


class Published(Peft):
    """The same, as PEFT-U's code does it: everything padded to 512, or to what the base takes."""

    def loss(self, reads: Sequence[Read]) -> Tensor:
        width = min(PUBLISHED_LENGTH, self.base.config.max_positions or PUBLISHED_LENGTH)
        if self.encodes:
            classes = torch.tensor([read.targets[0] for read in reads], device=self.device)
            return F.cross_entropy(self._classes(*self._padded([read.tokens for read in reads], width)), classes)
        texts = [(*read.tokens, read.targets[-1])[:width] for read in reads]
        ids, mask = self._padded(texts, width)
        answers = torch.full_like(ids, -100)
        for i, (text, read) in enumerate(zip(texts, reads)):
            answers[i, len(text) - read.num_read : len(text)] = torch.tensor(text[len(text) - read.num_read :])
        return self.model(input_ids=ids, attention_mask=mask, labels=answers, use_cache=False).loss
