"""What one would run without minipeft: transformers and peft, one user's LoRA after another. For comparison only.

    Peft        the base loaded once, LoRA's numbers put back to a user's start, each minibatch padded to its longest
                text, the head where a label is predicted, PyTorch's fused AdamW: no work that could be left out. On a
                base in bf16 LoRA's numbers are fp32 and its products bf16 (autocast), as ours are
    Published   as PEFT-U's code trains (arXiv:2407.18078): every text padded to 512 tokens, on an encoder-decoder its
                inputs and its targets; logits at all of them. Its reload of the base for every user is left out;
                `load_seconds` is what one takes

Both take the same minibatches, start values and learning rates as our engine, and return the row that it would.
"""

import time
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
from minipeft.methods.method import Method
from minipeft.models.classifier import Base, Classifier
from minipeft.models.decoder import Decoder
from minipeft.models.gpt2 import GPT2
from minipeft.models.t5 import T5
from minipeft.schedule import Job, Run

PUBLISHED_LENGTH = 512  # tokens
NOT_READ = -100  # a place without a target, to transformers and to PyTorch's cross_entropy


class Peft:
    """Hugging Face PEFT's LoRA on the folder that a base came from.

    Args:
        base:   a Llama's or GPT-2's kin, a T5, or an encoder with classes, read from a folder. Of its weights nothing
                is read: they may be on the meta device.
        method: a LoRA without dropout and patterns, with a head beside it on an encoder.
        device, dtype: of their base; None: as ours. fp32 or bf16.
    Raises:
        InputError: transformers or peft are not installed, or they cannot do what is asked.
    """

    def __init__(
        self, base: Base, labels: Answerable, method: Method, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
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
        if lora.dropout or lora.ranks or lora.alphas or not isinstance(base, (Decoder, GPT2, T5, Classifier)):
            raise InputError("peers train a plain LoRA of a Llama's, GPT-2's, T5's or BERT's kin")
        modules = modules_of(base)
        chosen = {site: modules[site] for site in lora.chosen(base)}
        if fused := [site for site, module in chosen.items() if module.outputs is not None]:
            raise InputError(f"peers train whole linear maps; {fused[0]} is a part of one in their "
                             f"{type(base).__name__}: choose other --sites")  # fmt: skip
        self.base, self.labels, self.method = base, labels, method
        self.device, self.dtype = torch.device(device or base.device), dtype or base.dtype
        self.encodes = isinstance(base, Classifier)
        folder, began = str(base.origin.folder), time.perf_counter()
        kinds = {Classifier: transformers.AutoModel, T5: transformers.AutoModelForSeq2SeqLM}
        kind = next((kinds[own] for own in kinds if isinstance(base, own)), transformers.AutoModelForCausalLM)
        options = {"add_pooling_layer": False} if self.encodes else {}
        self.model = kind.from_pretrained(folder, dtype=self.dtype, **options)
        self.model.to(self.device).eval().requires_grad_(False)
        self.load_seconds = time.perf_counter() - began
        config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.scaling == "rslora",
                                 target_modules=[module.path for module in chosen.values()],
                                 fan_in_fan_out=any(module.transposed for module in chosen.values()))  # fmt: skip
        self.adapted = peft.get_peft_model(self.model, config)  # LoRA's numbers are fp32, whatever the base's
        for module in self.adapted.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # autocast sees to it, once
        there = dict(self.adapted.named_parameters())
        self.own: dict[str, Tensor] = {}  # our names -> their parameters
        for site, module in chosen.items():
            for word in ("A", "B"):
                key = f"{ROOT}{module.path}.{KEYS[word]}".replace(".weight", ".default.weight")
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
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = self.loss(reads)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.advance()
        return self.method.row({name: tensor.detach().cpu() for name, tensor in self.own.items()}, self.base)

    def loss(self, reads: Sequence[Read]) -> Tensor:
        """Mean of -log p over the minibatch's target tokens."""
        ids = self._padded([read.tokens for read in reads])
        targets = torch.tensor([token for read in reads for token in read.targets], device=ids.device)
        if self.encodes:
            return F.cross_entropy(self._classes(reads, ids), targets)
        ends, width = [len(read.tokens) for read in reads], ids.shape[1]
        rows = [i * width + j for i, (end, read) in enumerate(zip(ends, reads))
                for j in range(end - read.num_read, end)]  # fmt: skip
        wanted = torch.tensor(rows, device=ids.device)
        # Padding lies on the right, where causal rows do not look: no mask, so that the fastest attention serves.
        if isinstance(self.base, T5):  # whose targets are all predicted
            logits = self._written(reads, self._padded([read.inputs for read in reads]), ids)
            return F.cross_entropy(logits[wanted].float(), targets)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return F.cross_entropy(self.model.lm_head(hidden.flatten(0, 1)[wanted]).float(), targets)

    def _classes(self, reads: Sequence[Read], ids: Tensor) -> Tensor:
        """[n, C] logits of the texts' means."""
        mask = self._mask([read.tokens for read in reads], ids)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        if mask is None:
            mean = hidden.mean(1)
        else:
            mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return F.linear(mean, self.own["head.weight"], self.own["head.bias"])

    def _written(self, reads: Sequence[Read], inputs: Tensor, targets: Tensor) -> Tensor:
        """An encoder-decoder's logits of all targets [n * width, vocab], each from its own inputs."""
        mask = self._mask([read.inputs for read in reads], inputs)
        out = self.model(input_ids=inputs, attention_mask=mask, decoder_input_ids=targets, use_cache=False)
        return out.logits.flatten(0, 1)

    def _padded(self, texts: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
        """ids, int64 [n, width]; None: as wide as the longest."""
        width, fill = width or max(map(len, texts)), self.model.config.pad_token_id or 0
        return torch.tensor([[*text, *[fill] * (width - len(text))] for text in texts], device=self.device)

    @staticmethod
    def _mask(texts: Sequence[Sequence[int]], ids: Tensor) -> Tensor | None:
        """int64 [n, width], 1 where the padded ids are text; None where they all are."""
        lengths, width = [len(text) for text in texts], ids.shape[1]
        if min(lengths) == width:
            return None
        return torch.tensor([[1] * length + [0] * (width - length) for length in lengths], device=ids.device)


class Published(Peft):
    """The same, as PEFT-U's code does it: everything padded to 512, or to what the base takes."""

    def loss(self, reads: Sequence[Read]) -> Tensor:
        width = min(PUBLISHED_LENGTH, self.base.config.max_positions or PUBLISHED_LENGTH)
        texts = [read.tokens for read in reads]
        if self.encodes:
            classes = torch.tensor([read.targets[0] for read in reads], device=self.device)
            return F.cross_entropy(self._classes(reads, self._padded(texts, width)), classes)
        if isinstance(self.base, T5):
            ids, inputs = self._padded(texts, width), self._padded([read.inputs for read in reads], width)
            logits = self._written(reads, inputs, ids)
            return F.cross_entropy(logits.float(), self._answers(reads, ids, texts).flatten(), ignore_index=NOT_READ)
        texts = [(*read.tokens, read.targets[-1]) for read in reads]
        ids = self._padded(texts, width)
        labels, mask = self._answers(reads, ids, texts), self._mask(texts, ids)
        return self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    @staticmethod
    def _answers(reads: Sequence[Read], ids: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """The targets at the last places of each text, NOT_READ elsewhere: int64, as ids."""
        answers = torch.full_like(ids, NOT_READ)
        for answer, text, read in zip(answers, texts, reads):
            answer[len(text) - read.num_read : len(text)] = torch.tensor(read.targets)
        return answers
