"""Write ``trl_golden.npz``: what TRL computes of given log-probabilities and logits.

Every number comes from TRL's own code: a method of a trainer, called with a stand-in
for the trainer that holds its settings, or, where a method does much else (PPO's
``train``, the advantages of GRPO and RLOO), the lines of its source between two that
are named here. In float32 on the CPU. To make it again, in an environment of its own:

    pip install torch==2.13.0 trl==1.10.0 transformers==5.24.0 peft==0.21.2
    pip install numpy==2.4.6 requests==2.34.2
    python tests/data/make_trl_golden.py

The file that is checked in was made with these versions and Python 3.11.

What the file holds
-------------------
``settings``   UTF-8 bytes of JSON: the versions, and what each loss was told
``pairs/*``    ids, completion_mask, logits (chosen rows first), the reference's sums;
               ``pairs/<loss>`` is DPO's loss, ``pairs/<loss>/grad`` its gradient for
               the logits; then sums and tokens of answers, and of each pair
               ``pairs/cpo``, ``pairs/simpo`` and ``pairs/orpo``, the odds term
``kto/*``      the same of KTO, with the mismatched answers' logits
``reward/*``   rewards, margin; ``reward/loss``
``answers/*``  log-probabilities (new, old, ref), mask, advantages;
               ``answers/<loss>`` and ``answers/<loss>/grad`` of GRPO's losses
``groups/*``   rewards of groups with NaN where no reward was found;
               ``groups/group``, ``none``, ``batch`` of GRPO, ``groups/rloo``
``ppo/*``      log-probabilities, values, scores, last tokens; rewards, advantages and
               returns in TRL's layout (score after the end), losses, gradients
``sft/*``      hidden, head, bias, labels (not shifted); ``sft/chunked_nll`` and its
               gradients, ``sft/dft``
``llama/*``    a random Llama: ``llama/state/<name>``, LoRA on q and v as
               ``llama/lora/<layer>/<q|v>/<a|b>`` in torch's shapes (a: (rank, in), b:
               (out, rank)); ids, attention_mask, completion_mask (right-padded;
               chosen rows first); ``llama/sft`` of the chosen rows, ``llama/dpo``,
               and gradients ``llama/<sft|dpo>/grad/<layer>/<q|v>/<a|b>``
"""

import contextlib
import inspect
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import torch
import transformers
import trl
from trl.experimental.cpo import cpo_trainer
from trl.experimental.orpo import orpo_trainer
from trl.experimental.ppo import ppo_trainer
from trl.trainer import (
    dpo_trainer,
    grpo_trainer,
    kto_trainer,
    reward_trainer,
    rloo_trainer,
    sft_trainer,
)

BETA, SMOOTHING = 0.1, 0.1
DPO = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down "
    "discopop sigmoid_norm"
).split()
ANSWERS = {
    "grpo": {},
    "bnpo": {},
    "dapo": {},
    "dr_grpo": {},
    "clip_higher": {"epsilon_low": 0.1, "epsilon_high": 0.4},
    "two_sided": {"delta": 1.3},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "kl": {"beta": 0.3},
    "kl_corrected": {"beta": 0.3, "use_bias_correction_kl": True},
}
LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}

RNG = np.random.default_rng(20261130)
normal = lambda *shape: torch.tensor(RNG.standard_normal(shape), dtype=torch.float32)
OUT: dict[str, np.ndarray] = {}


def keep(**arrays):
    """Into the file, under these names (`__` is a slash)."""
    for name, x in arrays.items():
        x = x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        narrow = {"float64": np.float32, "int64": np.int32}.get(str(x.dtype), x.dtype)
        OUT[name.replace("__", "/")] = np.array(x, narrow)


def trainer(**settings):
    """What TRL's methods ask of a trainer, for one process that evaluates."""
    same = lambda x, *_, **__: x
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        unwrap_model=same,
    )
    args = SimpleNamespace(**settings.pop("args", {}))
    return SimpleNamespace(
        accelerator=accelerator,
        args=args,
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **settings,
    )


def lines(function, first, last):
    """The source of `function` from the line that begins with `first` up to, and not
    with, the next one that begins with `last`."""
    source = inspect.getsource(function).splitlines()
    begin = next(k for k, x in enumerate(source) if x.strip().startswith(first))
    rest = enumerate(source[begin:], begin)
    end = next(k for k, x in rest if x.strip().startswith(last))
    return textwrap.dedent("\n".join(source[begin:end]))


def run(function, first, last, **names):
    """The names after these lines of TRL have run."""
    scope = {**vars(inspect.getmodule(function)), **names}
    exec(lines(function, first, last), scope)  # noqa: S102
    return scope


def ragged(*lengths, width):
    return torch.tensor([[int(k < n) for k in range(width)] for n in lengths])


# --- pairs ---------------------------------------------------------------------------


def dpo_self(loss, **settings):
    return trainer(
        loss_types=[loss],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=1e-3 if loss == "exo_pair" else SMOOTHING,
        ld_alpha=None,
        use_weighting=False,
        args={"discopop_tau": 0.05, "gradient_checkpointing_kwargs": None},
        **{
            "precompute_ref_logps": True,
            "f_divergence_type": "reverse_kl",
            **settings,
        },
    )


def pairs():
    ids = torch.tensor(RNG.integers(0, 11, (6, 7)))
    # Prompts of 2 tokens, answers of 1 to 5.
    mask = ragged(7, 5, 6, 3, 7, 4, width=7)
    completion = mask * (torch.arange(7) >= 2)
    logits = 2 * normal(6, 7, 11)
    ref_chosen, ref_rejected = -8 + normal(3), -8 + normal(3)
    keep(
        pairs__ids=ids,
        pairs__completion_mask=completion,
        pairs__logits=logits,
        pairs__ref_chosen=ref_chosen,
        pairs__ref_rejected=ref_rejected,
    )

    def one(name, loss, **settings):
        z = logits.clone().requires_grad_()
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "completion_mask": completion,
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
        }
        model = lambda **_: SimpleNamespace(logits=z)
        own = dpo_self(loss, **settings)
        value = dpo_trainer.DPOTrainer._compute_loss(own, model, inputs, False)
        value.backward()
        keep(**{f"pairs__{name}": value, f"pairs__{name}__grad": z.grad})

    for loss in DPO:
        one(loss, loss)
    for divergence in ("forward_kl", "js_divergence"):
        one(divergence, "sigmoid", f_divergence_type=divergence)

    chosen, rejected = -10 + normal(4), -12 + normal(4)
    n_c, n_d = torch.tensor([5, 2, 7, 3]), torch.tensor([8, 3, 4, 3])
    keep(
        pairs__sums_chosen=chosen,
        pairs__sums_rejected=rejected,
        pairs__tokens_chosen=n_c,
        pairs__tokens_rejected=n_d,
    )
    for name, loss, beta, by in (
        ("cpo", "sigmoid", BETA, (1, 1)),
        ("simpo", "simpo", 2.0, (n_c, n_d)),
    ):
        own = trainer(
            loss_type=loss, beta=beta, simpo_gamma=1.0, label_smoothing=0.0, alpha=0.0
        )
        losses = cpo_trainer.CPOTrainer.cpo_loss(own, chosen / by[0], rejected / by[1])
        keep(**{f"pairs__{name}": losses[0]})
    own = trainer(beta=1.0)
    means = chosen / n_c, rejected / n_d
    odds = orpo_trainer.ORPOTrainer.odds_ratio_loss(own, *means)
    keep(pairs__orpo=-odds[0])


def kto():
    ids = torch.tensor(RNG.integers(0, 11, (4, 6)))
    mask, other_mask = ragged(6, 4, 5, 6, width=6), ragged(4, 5, 6, 6, width=6)
    answer = torch.arange(6) >= 2
    other_ids = torch.tensor(RNG.integers(0, 11, (4, 6)))
    z, other = (2 * normal(4, 6, 11)).requires_grad_(), 2 * normal(4, 6, 11)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": mask * answer,
        "KL_input_ids": other_ids,
        "KL_attention_mask": other_mask,
        "KL_completion_mask": other_mask * answer,
        "label": torch.tensor([True, False, False, True]),
        "ref_logps": -8 + normal(4),
        # Low, so that the divergence is above zero.
        "ref_KL_logps": -16 + normal(4),
    }
    own = trainer(
        beta=BETA,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        precompute_ref_logps=True,
        use_liger_kernel=False,
    )
    model = lambda **k: SimpleNamespace(
        logits=other if k["input_ids"] is other_ids else z
    )
    model_kl = kto_trainer.KTOTrainer._compute_kl_logps
    own._compute_kl_logps = lambda *a: model_kl(own, *a)
    loss = kto_trainer.KTOTrainer._compute_loss(own, model, batch, False)
    loss.backward()
    keep(kto__logits=z, kto__other_logits=other, kto__loss=loss, kto__grad=z.grad)
    keep(**{f"kto__{k}": v for k, v in batch.items() if "attention" not in k})
    keep(kto__kl=own._metrics["eval"]["kl"][0])


def reward():
    rewards, margin = normal(6), normal(3).abs()
    own = trainer(args={"center_rewards_coefficient": 0.01})
    loss = reward_trainer.RewardTrainer.compute_loss(
        own, lambda **_: SimpleNamespace(logits=rewards[:, None]), {"margin": margin}
    )
    keep(reward__rewards=rewards, reward__margin=margin, reward__loss=loss)


# --- answers -------------------------------------------------------------------------


def answers():
    new, old, ref = (-1 + 0.4 * normal(4, 6) for _ in range(3))
    mask, advantages = ragged(6, 2, 4, 5, width=6), normal(4)
    keep(
        answers__new=new,
        answers__old=old,
        answers__ref=ref,
        answers__mask=mask,
        answers__advantages=advantages,
    )
    for name, told in ANSWERS.items():
        own_loss = name if name in ("grpo", "bnpo", "dapo", "dr_grpo") else "dapo"
        p = new.clone().requires_grad_()
        told = {"loss_type": own_loss, **told}
        args = {
            "delta": told.pop("delta", None),
            "use_bias_correction_kl": told.pop("use_bias_correction_kl", False),
        }
        settings = {
            "beta": 0.0,
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "importance_sampling_level": "token",
            "max_completion_length": 6,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "use_vllm": False,
            "_entropy_bonus_enabled": False,
            **told,
        }
        own = trainer(args=args, **settings)
        own._get_per_token_logps_and_entropies = lambda *_, p=p, **__: (p, -p, None)
        inputs = {
            "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
            "prompt_mask": torch.ones(4, 1, dtype=torch.long),
            "completion_ids": torch.zeros(4, 6, dtype=torch.long),
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        }
        loss = grpo_trainer.GRPOTrainer._compute_loss(own, own.model, inputs)
        loss.backward()
        keep(**{f"answers__{name}": loss, f"answers__{name}__grad": p.grad})


def groups():
    rewards = normal(3, 4)
    rewards[1, 2] = torch.nan
    rewards[2] = 0.1
    keep(groups__rewards=rewards)
    flat = rewards.reshape(-1, 1)
    for scale in ("group", "none", "batch"):
        own = SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.ones(1),
            scale_rewards=scale,
        )
        made = run(
            grpo_trainer.GRPOTrainer._generate_and_score_completions,
            "unscorable_mask = ",
            "elif self.multi_objective_aggregation",
            self=own,
            rewards_per_func=flat,
            num_generations=4,
            device="cpu",
        )
        keep(**{f"groups__{scale}": torch.nan_to_num(made["advantages"]).view(3, 4)})
    made = run(
        rloo_trainer.RLOOTrainer._generate_and_score_completions,
        "grouped_rewards = ",
        "is_std_zero",
        self=SimpleNamespace(normalize_advantages=False),
        rewards=rewards.view(-1),
        num_generations=4,
    )
    keep(groups__rloo=made["advantages"].view(3, 4))


def ppo():
    train = ppo_trainer.PPOTrainer.train
    logprobs, ref = -1 + 0.4 * normal(3, 6), -1 + 0.4 * normal(3, 6)
    values, scores = normal(3, 6), normal(3)
    last = torch.tensor([2, 5, 3])  # the answers' last tokens; the second fills its row
    args = SimpleNamespace(
        kl_estimator="k1",
        kl_coef=0.05,
        whiten_rewards=False,
        gamma=0.9,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
    )
    keep(
        ppo__logprobs=logprobs,
        ppo__ref=ref,
        ppo__values=values,
        ppo__scores=scores,
        ppo__last=last,
    )
    made = run(
        train,
        "response_idxs = ",
        "empty_cache()",
        responses=torch.zeros(3, 6),
        sequence_lengths=last,
        logprobs=logprobs,
        ref_logprobs=ref,
        values=values.clone(),
        scores=scores,
        args=args,
    )
    keep(
        ppo__rewards=made["rewards"],
        ppo__advantages=made["advantages"],
        ppo__returns=made["returns"],
    )
    new, vpred = logprobs + 0.3 * normal(3, 6), values + 0.3 * normal(3, 6)
    keep(ppo__new=new, ppo__new_values=vpred)
    new, vpred = new.requires_grad_(), vpred.requires_grad_()
    masks = {k: made[k] for k in ("padding_mask", "padding_mask_p1")}
    losses = run(
        train,
        "vpredclipped = ",
        "loss = pg_loss",
        vpred=torch.masked_fill(vpred, masks["padding_mask_p1"], 0),
        new_logprobs=torch.masked_fill(new, masks["padding_mask"], 1.0),
        mb_values=made["values"],
        mb_return=made["returns"],
        mb_logprobs=made["logprobs"],
        mb_advantage=made["advantages"],
        micro_batch_inds=slice(None),
        args=args,
        **masks,
    )
    (losses["pg_loss"] + losses["vf_loss"]).backward()
    keep(
        ppo__policy_loss=losses["pg_loss"],
        ppo__value_loss=losses["vf_loss"],
        ppo__policy_grad=new.grad,
        ppo__value_grad=vpred.grad,
    )


# --- supervised ----------------------------------------------------------------------


def sft():
    hidden, head = normal(3, 7, 5).requires_grad_(), normal(11, 5).requires_grad_()
    bias = normal(11).requires_grad_()
    labels = torch.tensor(RNG.integers(0, 11, (3, 7)))
    labels[:, :2] = -100
    labels[1, 4:] = -100
    chunked = sft_trainer._chunked_cross_entropy_loss(
        hidden, head, 4, labels=labels, lm_head_bias=bias, final_logit_softcapping=3.0
    )
    chunked[0].backward()
    keep(
        sft__hidden=hidden,
        sft__head=head,
        sft__bias=bias,
        sft__labels=labels,
        sft__chunked_nll=chunked[0],
        sft__hidden_grad=hidden.grad,
        sft__head_grad=head.grad,
        sft__bias_grad=bias.grad,
    )
    logits = hidden.detach() @ head.detach().T
    loss = sft_trainer.dft_loss(SimpleNamespace(logits=logits), labels)
    keep(sft__dft=loss)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        # Wide enough that the losses are no log 37; norms that are not all one.
        p.data = normal(*p.shape) * (0.3 if p.ndim == 2 else 0.1)
        p.data += 1.0 if p.ndim == 1 else 0.0
        keep(**{f"llama__state__{name}": p})
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    factors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer, side = name.split("layers.")[1][0], name.split("_proj")[0][-1]
            factor = "a" if "lora_A" in name else "b"
            p.data = 0.3 * normal(*p.shape)
            factors[f"{layer}__{side}__{factor}"] = p
    keep(**{f"llama__lora__{k}": p for k, p in factors.items()})

    ids = torch.tensor(RNG.integers(1, 37, (4, 9)))
    mask = ragged(9, 6, 7, 9, width=9)
    completion = mask * (torch.arange(9) >= 3)
    keep(
        llama__ids=ids * mask,
        llama__attention_mask=mask,
        llama__completion_mask=completion,
    )

    def losses():
        labels = torch.where(completion.bool(), ids, -100)[:2]
        yield (
            "sft",
            model(
                input_ids=(ids * mask)[:2], attention_mask=mask[:2], labels=labels
            ).loss,
        )
        own = dpo_self("sigmoid", precompute_ref_logps=False, ref_model=None)
        own.model = model
        inputs = {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "completion_mask": completion,
        }
        yield "dpo", dpo_trainer.DPOTrainer._compute_loss(own, model, inputs, False)

    for name, loss in losses():
        model.zero_grad()
        loss.backward()
        keep(**{f"llama__{name}": loss})
        for k, p in factors.items():
            keep(**{f"llama__{name}__grad__{k}": p.grad.clone()})


def main() -> None:
    """Run TRL and write the file beside this script."""
    for make in (pairs, kto, reward, answers, groups, ppo, sft, llama):
        make()
    settings = {
        "versions": {
            m.__name__: m.__version__ for m in (torch, trl, transformers, peft, np)
        },
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "answers": ANSWERS,
        "llama": LLAMA,
        "lora": LORA,
    }
    text = json.dumps(settings, sort_keys=True).encode()
    OUT["settings"] = np.frombuffer(text, np.uint8)
    path = Path(__file__).with_name("trl_golden.npz")
    np.savez_compressed(path, **OUT)
    print(path.stat().st_size, "bytes,", len(OUT), "arrays")


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):
        torch.set_num_threads(1)
    main()
