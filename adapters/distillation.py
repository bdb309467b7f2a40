"""Context distillation: a LoRA learns to answer as the base does with memories in its context.

    p_t = softmax(z_teacher / T)     teacher: the base, with the texts in the context
    q_t = softmax(z_student / T)     student: the base + LoRA, without them

    L = (1/N) Σ_t [ w_t T² KL(p_t ‖ q_t) - v_t log softmax(z_student)[y_t] ]

    KL over the teacher's k likeliest tokens K and one rest:
        Σ_{i∈K} p_i log(p_i / q_i) + r log(r / s)      r = 1 - Σ_K p_i,  s = 1 - Σ_K q_i
    never more than the KL over all tokens, and equal to it when k is the vocabulary

| symbol | field              | shape                                                               |
|--------|--------------------|---------------------------------------------------------------------|
| N      |                    | answer tokens of a batch                                            |
| T      | ``temperature``    | number                                                              |
| k      | ``top_k``          | integer                                                             |
| w      | by the row's kind  | [N]: 1 answers, ``anchor_weight`` unrelated prompts, 0 statements   |
| v      | by the row's kind  | [N]: ``lm_weight`` template answers, ``statement_weight`` statements |

Rows are template questions with template answers, the same questions with the teacher's greedy answers,
the statements by themselves, and unrelated prompts whose teacher is the plain base. The teacher's
distributions are computed once, before training.

Reference: Snell, Klein & Zhong 2022, Learning by Distilling Context, arXiv 2209.15189; the loss is that of
Hinton et al. 2015, arXiv 1503.02531.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from persona_sdk.adapters.distillation_data import ANCHORS, paraphrases, training_pairs
from persona_sdk.adapters.lora import LoRA, LoRAConfig, bound, select_modules
from persona_sdk.adapters.statements import Fact
from persona_sdk.adapters.training import fit, lora_layers
from persona_sdk.adapters.training_data import IGNORED, collate
from persona_sdk.adapters.twin import twin
from persona_sdk.errors import InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.prompting import Message, control_tokens, encode, text_ids, with_passages


class DistillationConfig(LoRAConfig):
    """How to make weights of texts; LoRA's options and these."""

    num_train_epochs: float = Field(5.0, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(64, ge=1, description="tokens of the teacher's distribution; the rest is one")
    lm_weight: float = Field(0.5, ge=0, description="of the template answers' own likelihood")
    statement_weight: float = Field(0.5, ge=0, description="of the statements' own likelihood")
    anchor_weight: float = Field(1.0, ge=0, description="of staying the base on unrelated prompts")
    anchors: int = Field(len(ANCHORS), ge=0, le=len(ANCHORS), description="unrelated prompts")
    samples: bool = Field(True, description="also learn the teacher's own greedy answers")
    max_answer_tokens: int = Field(24, ge=1, description="of a greedy answer")


def top_k_targets(
    teacher: Float[Tensor, "n v"], k: int, temperature: float = 1.0
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The k likeliest tokens of each row, and ``log p`` of each."""
    found = teacher.float().div(temperature).log_softmax(-1).topk(min(k, teacher.shape[-1]), dim=-1)
    return found.indices, found.values


def top_k_kl(
    ids: Int[Tensor, "n k"],
    log_p: Float[Tensor, "n k"],
    student: Float[Tensor, "n v"],
    temperature: float = 1.0,
) -> Float[Tensor, " n"]:
    """``T² (Σ_{i∈K} p_i log(p_i / q_i) + r log(r / s))`` of each row; see the module."""
    log_q = student.float().div(temperature).log_softmax(-1)
    p = log_p.exp()
    total = (p * (log_p - log_q.gather(-1, ids))).sum(-1)
    if ids.shape[-1] < student.shape[-1]:
        log_s = log_q.scatter(-1, ids, float("-inf")).logsumexp(-1)
        r = (1 - p.sum(-1)).clamp_min(0)
        total = total + torch.xlogy(r, r) - r * log_s
    return temperature**2 * total


def distillation_loss(
    student: Float[Tensor, "n v"],
    ids: Int[Tensor, "n k"],
    log_p: Float[Tensor, "n k"],
    targets: Int[Tensor, " n"],
    w: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """``(1/N) Σ_t [ w_t T² KL(p_t ‖ q_t) - v_t log softmax(z_t)[y_t] ]``."""
    likelihood = F.cross_entropy(student.float(), targets, reduction="none")
    return (w * top_k_kl(ids, log_p, student, temperature) + v * likelihood).mean()


def distil(
    model: LanguageModel,
    texts: Sequence[str | Fact],
    options: Any = None,
    *,
    progress: bool | None = None,
    check: Callable[[], None] = lambda: None,
) -> LoRA:
    """A LoRA that answers questions about `texts` without them in the prompt.

    The base model may be in use meanwhile: training runs on a twin of it.

    Args:
        model: the base model.
        texts: what to know.
        options: a `DistillationConfig`, a mapping of its options, or None for the defaults.
        progress: show a bar; None shows it on a terminal.
        check: called between small steps; what it raises ends the work, and nothing is left of it.

    Raises:
        InvalidInputError: no texts, a blank one, or options that cannot be used.
        AdapterError: training diverged; no adapter is made.
    """
    if isinstance(texts, str) or not texts or any(not Fact.of(text).text.strip() for text in texts):
        raise InvalidInputError(
            "There is no text to distil.", hint="Give a list of texts that are not blank."
        )
    options = DistillationConfig.from_options(options)
    own = twin(model)
    modules = select_modules(own, options.target_modules)
    rows = distillation_rows(own, texts, options, check=check)
    layers = {"rank": options.rank, "alpha": options.scale * options.rank, "dropout": options.dropout}
    with lora_layers(own, modules, seed=options.seed, **layers) as factors:
        student = _Student(own.module, options.temperature)
        report = fit(own, student, rows, options, progress=progress, collator=_collate, check=check)
        tensors = factors()
    plain = LoRAConfig(**options.model_dump(include=set(LoRAConfig.model_fields)))
    return LoRA(base=model.fingerprint, config=bound(plain, own, modules), tensors=tensors, report=report)


def distillation_rows(
    model: LanguageModel,
    texts: Sequence[str | Fact],
    options: DistillationConfig,
    *,
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Token ids, labels, the teacher's distributions and weights of every row."""
    make = _Rows(model, options, check)
    rows = []
    for fact in map(Fact.of, texts):
        known = [fact.text]
        for question, answer in training_pairs(fact):
            rows.append(make.row(question, make.reply(answer), known, w=1.0, v=options.lm_weight))
            if options.samples:
                rows.append(make.row(question, make.greedy(question, known), known, w=1.0, v=0.0))
        if options.statement_weight:
            rows += [make.statement(said) for said in paraphrases(fact)]
    if options.anchor_weight:
        for question in ANCHORS[: options.anchors]:
            rows.append(make.row(question, make.greedy(question, []), [], w=options.anchor_weight, v=0.0))
    return rows


@torch.inference_mode()
def greedy(
    model: LanguageModel, prompt: Sequence[int], tokens: int, *, check: Callable[[], None] = lambda: None
) -> list[int]:
    """The likeliest token after a prompt, again and again, up to `tokens` of them or the end token."""
    answer: list[int] = []
    cache, new = None, list(prompt)
    for _ in range(tokens):
        check()
        ids = torch.tensor([new], device=model.device)
        out = model.module(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, new = out.past_key_values, [int(out.logits[0, -1].argmax())]
        answer += new
        if new[0] == model.tokenizer.eos_token_id:
            break
    return answer


class _Rows:
    """Makes rows with one teacher."""

    def __init__(self, model: LanguageModel, options: DistillationConfig, check: Callable[[], None]) -> None:
        self._model, self._options, self._check = model, options, check
        self._control = control_tokens(model.tokenizer)
        end = model.tokenizer.eos_token_id
        self._end = [] if end is None else [int(end)]
        self._longest = min(options.max_length, model.context_length)

    def reply(self, text: str) -> list[int]:
        return [*text_ids(self._model.tokenizer, text, self._control), *self._end]

    def greedy(self, question: str, known: Sequence[str]) -> list[int]:
        """The teacher's own answer."""
        prompt = self._prompt(question, known)
        return greedy(self._model, prompt, self._options.max_answer_tokens, check=self._check)

    @torch.inference_mode()
    def row(
        self, question: str, answer: Sequence[int], known: Sequence[str], *, w: float, v: float
    ) -> dict[str, Any]:
        """What the student reads, and what the teacher, who also reads `known`, expects of the answer."""
        self._check()
        told, asked = self._prompt(question, known), self._prompt(question, [])
        answer = list(answer)[: max(self._longest - max(len(told), len(asked)), 1)]
        ids = torch.tensor([[*told, *answer]], device=self._model.device)
        logits = self._model.module(input_ids=ids, use_cache=False).logits[0, len(told) - 1 : -1]
        return self._labelled([*asked, *answer], len(asked), logits, w, v)

    @torch.inference_mode()
    def statement(self, text: str) -> dict[str, Any]:
        """The text by itself: its own likelihood counts, no teacher."""
        self._check()
        found = text_ids(self._model.tokenizer, text, self._control, special=True)
        ids = [*found, *self._end][: self._longest]
        ids = ids if len(ids) > 1 else [*ids, *ids]  # nothing predicts the very first token
        logits = self._model.module(
            input_ids=torch.tensor([ids], device=self._model.device), use_cache=False
        ).logits[0, :-1]
        return self._labelled(ids, 1, logits, 0.0, self._options.statement_weight)

    def _labelled(
        self, ids: list[int], first: int, logits: Float[Tensor, "n v"], w: float, v: float
    ) -> dict[str, Any]:
        chosen, log_p = top_k_targets(logits, self._options.top_k, self._options.temperature)
        labels = [IGNORED] * first + ids[first:]
        teacher = {"teacher_ids": chosen.cpu().clone(), "teacher_log_p": log_p.cpu().clone()}
        return {"input_ids": ids, "labels": labels, **teacher, "w": w, "v": v}

    def _prompt(self, question: str, known: Sequence[str]) -> tuple[int, ...]:
        turn = Message(role="user", content=question)
        return encode(self._model.tokenizer, with_passages([turn], known))


def _collate(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """One batch; what belongs to answer tokens is joined in the order of rows and tokens."""
    batch = collate([{name: row[name] for name in ("input_ids", "labels")} for row in rows], pad_id)
    counts = [len(row["teacher_ids"]) for row in rows]
    for name in ("teacher_ids", "teacher_log_p"):
        batch[name] = torch.cat([row[name] for row in rows])
    for name in ("w", "v"):
        batch[name] = torch.cat([torch.full((n,), row[name]) for row, n in zip(rows, counts, strict=True)])
    return batch


class _Student(nn.Module):
    """The base with LoRA layers in it, as the Trainer wants it: a batch in, a loss out."""

    def __init__(self, module: nn.Module, temperature: float) -> None:
        super().__init__()
        self.module = module
        self._temperature = temperature

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        teacher_ids: Tensor,
        teacher_log_p: Tensor,
        w: Tensor,
        v: Tensor,
    ) -> dict[str, Tensor]:
        logits = self.module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        learned = labels[:, 1:] != IGNORED
        student, targets = logits[:, :-1][learned], labels[:, 1:][learned]
        return {
            "loss": distillation_loss(student, teacher_ids, teacher_log_p, targets, w, v, self._temperature)
        }
