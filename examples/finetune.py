"""Fine-tune a BERT checkpoint on text classification, with any recipe of jpeft.

    python examples/finetune.py                                    # LoRA, default data
    python examples/finetune.py --config configs/bitfit.toml
    python examples/finetune.py --data train.tsv --eval test.tsv --label-column label
    python examples/finetune.py --base path/to/bert --epochs 3 --out runs/mine
    python examples/finetune.py --resume                           # after Ctrl-C

On Linux GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment makes a step on a CPU
take less: XLA asks for its memory anew at every step, then in pages of 2 MB.

The default base is all-MiniLM-L6-v2, and the default data are the docstrings of
Python's standard library, labelled by the part they come from. A recipe
(``configs/*.toml``) says what trains and how; the options override its ``[train]``.

The folder ``--out`` receives the adapter, ``metrics.json``, ``curves.png`` and the
checkpoints. An interrupted run that is resumed ends with the same adapter, bit for bit,
as one that was not interrupted. Exit codes: 0, 1 if a check or the training failed, 2
for input that cannot be used, 130 after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft

try:
    import _bert
    import _encoded
    import _recipe
    import _report
    import _runs
    import _stages
    import _text
    from _runs import Failed
    from safetensors import SafetensorError
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: {missing.name} is not installed; type: "
        "pip install -e '.[examples,plots]'"
    ) from None

EVALUATIONS_PER_EPOCH = 2
# Points of the accuracy curve and the checks of saved and merged weights use so many
# held-out examples; the scores before and after use all.
SUBSET = 256
MERGE_TOLERANCE = 1e-4  # float32 sums in another order, on logits of order 1 to 10


# -------------------------------------------------------------------------- the heart


def attach(
    peft: jpeft.Transform, model: _bert.BertClassifier, base: Any, key: jax.Array
) -> Any:
    """The base with adapted leaves where the recipe wants them."""
    ids = mask = jax.ShapeDtypeStruct((2, 3), jnp.int32)  # traced, never computed
    forward = lambda p, ids, mask: model.apply({"params": p}, ids, mask)
    uses = jpeft.find_uses(forward, base, ids, mask)
    return peft(key, base, uses=uses)


def started_from_text(
    params: Any, model: _bert.BertClassifier, train: _encoded.Encoded
) -> Any:
    """The parameters with prefixes that hold the keys and values of training texts.

    The longest texts, without [CLS] and [SEP], one after the other.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    # The rows of a prefix, or what a network makes them of.
    rows = [
        x
        for path, x in leaves
        if jax.tree_util.keystr(path).endswith((".keys", ".embedding"))
    ]
    length = max((x.shape[-2] for x in rows), default=1)
    if length > (positions := model.config.max_position_embeddings):
        raise ValueError(
            f"a prefix of {length} rows cannot start as a text: the model reads only "
            f"{positions} positions; shorten the prefix, or prefix_start = 'drawn'"
        )
    longest = np.argsort(-train.mask.sum(1), kind="stable")
    texts = (train.ids[k][train.mask[k] > 0][1:-1] for k in longest)
    words = np.fromiter(itertools.chain.from_iterable(texts), np.int32)[None, :length]
    forward = lambda p, ids, mask: model.apply({"params": p}, ids, mask)
    return jpeft.prefix_from_text(forward, params, words, np.ones_like(words))


def make_step(
    model: _bert.BertClassifier, stage: _stages.Stage
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """One step of training: gradients exist for the trainable leaves only."""

    def loss_of(trainable, frozen, ids, mask, labels, key):
        apply = jpeft.adapt(model.apply, key=key)  # for dropout and random gates
        logits = apply({"params": jpeft.combine(trainable, frozen)}, ids, mask)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss + (stage.penalty(trainable) if stage.penalty else 0.0), loss

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, opt_state, frozen, ids, mask, labels, key):
        (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(
            trainable, frozen, ids, mask, labels, key
        )
        updates, opt_state = stage.optimizer.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    return step


def make_optimizer(recipe: _recipe.Train, steps: int) -> optax.GradientTransformation:
    """AdamW after a linear warm-up; then the rate falls to 0 or stays."""
    peak, warmup = recipe.learning_rate, max(1, round(recipe.warmup * steps))
    end = 0.0 if recipe.schedule == "linear" else peak
    rate = optax.join_schedules(
        [
            # The first step already moves: its rate is peak / warmup, not 0.
            optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)),
            optax.linear_schedule(peak, end, max(1, steps - warmup)),
        ],
        [warmup],
    )
    optimizer = optax.adamw(rate, weight_decay=recipe.weight_decay)
    if recipe.head_learning_rate is not None:
        factor = recipe.head_learning_rate / peak
        optimizer = optax.chain(optimizer, _stages.head_times(factor))
    plus = recipe.lora_plus
    return jpeft.optim.lora_plus(optimizer, plus.ratio) if plus else optimizer


def make_stages(recipe: _recipe.Train, steps: int) -> list[_stages.Stage]:
    """The parts of the training, one unless the method wants more."""

    def make(steps: int, **changes: float) -> optax.GradientTransformation:
        return make_optimizer(dataclasses.replace(recipe, **changes), steps)

    method = recipe.adalora or recipe.diff_pruning
    return method.stages(steps, make) if method else [_stages.Stage(steps, make(steps))]


# -------------------------------------------------------------------------- preparing


class Keys(NamedTuple):
    """What is random, each with a stream of its own."""

    head: jax.Array
    peft: jax.Array
    dropout: jax.Array


def keys(seed: int) -> Keys:
    """The keys of a run."""
    return Keys(*jax.random.split(jax.random.key(seed), 3))


@dataclasses.dataclass(eq=False)
class Run:
    """What is trained, on what, and how far it is."""

    out: Path
    name: str
    recipe: _recipe.Train
    settings: dict[str, Any]
    base_folder: Path
    classes: tuple[str, ...]
    train: _encoded.Encoded
    held_out: _encoded.Encoded
    model: _bert.BertClassifier
    peft: jpeft.Transform
    stages: list[_stages.Stage]
    manager: jpeft.CheckpointManager
    params: Any
    opt_state: Any
    step: int
    history: dict[str, Any]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train) // self.recipe.batch_size

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def subset(self) -> _encoded.Encoded:
        return self.held_out.sample(SUBSET, self.recipe.seed)


def read_base(
    folder: Path, num_classes: int, key: jax.Array
) -> tuple[_bert.BertClassifier, Any]:
    """The model, and its parameters: the checkpoint's, and a new classifier."""
    config, encoder = _bert.load_base(folder)
    model = _bert.BertClassifier(config, num_classes)
    ids = jnp.zeros((1, 3), jnp.int32)
    classifier = jax.jit(model.init)(key, ids, ids)["params"]["classifier"]
    # On the device once, not from NumPy again at every step.
    return model, jax.device_put({"bert": encoder, "classifier": classifier})


def prepare(args: argparse.Namespace, peft: jpeft.Transform | None = None) -> Run:
    """Everything up to the first step; what the user can get wrong is found here.

    peft: in place of the recipe's.
    """
    path = _recipe.find(args.config)
    of_recipe, recipe = _recipe.read(path, vars(args))
    peft = of_recipe if peft is None else peft
    out = args.out or Path("runs") / path.stem
    folder = args.base or _bert.default_base()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--base {folder}: no such directory; expected one of a Hugging Face BERT "
            "(config.json, tokenizer.json, model.safetensors)"
        )
    texts = _encoded.read(
        *(args.data, args.eval),
        columns={"text": args.text_column, "label": args.label_column},
        limits=(args.max_train, args.max_eval),
        seed=recipe.seed,
    )
    if args.validate is not None:
        texts = _text.split(texts[0], fraction=args.validate)
    if recipe.batch_size > len(texts[0]):
        raise ValueError(
            f"batch_size {recipe.batch_size}: there are only {len(texts[0])} examples "
            "to train on; choose a smaller --batch-size"
        )
    classes = texts[0].classes
    model, base = read_base(folder, len(classes), keys(recipe.seed).head)
    virtual = peft.virtual_tokens()
    if recipe.length + virtual > (positions := model.config.max_position_embeddings):
        more = f" and {virtual} virtual tokens" if virtual else ""
        raise ValueError(
            f"length {recipe.length}{more}: the base has only {positions} positions; "
            "choose a smaller --length"
        )
    tokenize = _bert.load_tokenizer(folder, recipe.length)
    vocab = model.config.vocab_size
    train, held_out = (
        _encoded.encode(x, tokenize, vocab).prepended(virtual, vocab) for x in texts
    )
    params = attach(peft, model, base, keys(recipe.seed).peft)
    if recipe.prefix_start == "text":
        params = started_from_text(params, model, train)
    run = Run(
        out=out,
        name=path.stem,
        recipe=recipe,
        settings={
            "peft": peft.to_config(),
            **dataclasses.asdict(recipe),
            "classes": list(classes),
            "batches": f"of like length, {_text.POOL} at a time",
            "train_checksum": train.checksum(),
            "held_out_checksum": held_out.checksum(),
        },
        base_folder=folder,
        classes=classes,
        train=train,
        held_out=held_out,
        model=model,
        peft=peft,
        stages=[],
        manager=jpeft.CheckpointManager(out / _runs.CHECKPOINTS, peft, max_to_keep=2),
        params=params,
        opt_state=None,
        step=0,
        history={"before": None, "loss": [], "accuracy": []},
    )
    run.stages = make_stages(recipe, run.steps)
    run.opt_state = initial_state(run.stages[0], params)
    if args.resume:
        _runs.check_same(out, run.settings)
        restore(run, base)
    else:
        _runs.begin(out, run.settings, overwrite=args.overwrite)
    return run


def restore(run: Run, base: Any) -> None:
    """Puts the run where its latest checkpoint was, the latest that can be read."""
    for step in reversed(run.manager.steps()):
        ends = itertools.accumulate(stage.steps for stage in run.stages)
        stage = next(x for x, end in zip(run.stages, ends, strict=True) if step <= end)
        try:
            run.params, run.opt_state, metadata = run.manager.restore(
                base, partial(initial_state, stage), step=step
            )
        except jpeft.DamagedError as error:
            print(f"step {step} is left out: {error}", file=sys.stderr)
            continue
        run.step, run.history = step, metadata["history"]
        return
    raise _runs.nothing_to_resume(run.out)


def initial_state(stage: _stages.Stage, params: Any) -> Any:
    """The optimiser's, before the stage's first step."""
    return stage.optimizer.init(jpeft.partition(params)[0])


# --------------------------------------------------------------------------- training


def train(
    run: Run, logits: Callable[..., jax.Array], stop: Callable[[], bool]
) -> float:
    """Trains to the end; leaves the result, finalised, in ``run``.

    Gives examples per second.  After a step at which ``stop()`` is true it saves a
    checkpoint and raises Interrupted.
    """
    first, seconds, begin = run.step, 0.0, 0
    with _progress(run) as bar:
        for stage in run.stages:
            end = begin + stage.steps
            if run.step <= end:  # a stage that was left at its end is still finished
                if run.step == begin:
                    run.opt_state = initial_state(stage, run.params)
                seconds += _train_stage(run, stage, end, logits, stop, bar)
                if stage.finish is not None:
                    run.params = stage.finish(run.params)
            begin = end
    # Checkpoints keep what only trains, such as the network that makes a prefix.
    run.params = jpeft.finalize(run.params)
    return run.recipe.batch_size * (run.step - first) / seconds if seconds else 0.0


def _train_stage(
    run: Run,
    stage: _stages.Stage,
    end: int,
    logits: Callable[..., jax.Array],
    stop: Callable[[], bool],
    bar: Any,
) -> float:
    """Trains up to the step ``end``; gives the seconds that the steps took."""
    history, subset, seconds = run.history, run.subset, 0.0
    step, dropout = make_step(run.model, stage), keys(run.recipe.seed).dropout
    trainable, frozen = jpeft.partition(run.params)
    opt_state = run.opt_state
    for rows in itertools.islice(_batches_from(run, run.step), end - run.step):
        began, batch = time.perf_counter(), run.train.take(rows)
        key = jax.random.fold_in(dropout, run.step)
        trainable, opt_state, loss = step(
            trainable, opt_state, frozen, batch.ids, batch.mask, batch.labels, key
        )
        run.step += 1
        history["loss"].append(float(loss))
        seconds += time.perf_counter() - began
        if not np.isfinite(history["loss"][-1]):
            raise Failed(
                f"the loss is {history['loss'][-1]} at step {run.step}; try a "
                f"--learning-rate below {run.recipe.learning_rate:g}"
            )
        bar.set_postfix(loss=f"{np.mean(history['loss'][-20:]):.3f}", refresh=False)
        bar.update(run.recipe.batch_size)
        run.params, run.opt_state = jpeft.combine(trainable, frozen), opt_state
        if _is_evaluated(run):
            found = _encoded.predict(logits, run.params, subset).argmax(1)
            accuracy = float(np.mean(found == subset.labels))
            history["accuracy"].append([run.step, accuracy])
        if (stopped := stop()) or run.step % run.steps_per_epoch == 0:
            run.manager.save(
                *(run.step, run.params),
                state=run.opt_state,
                metadata={"history": history},
            )
        if stopped:
            raise _runs.Interrupted
    return seconds


def _is_evaluated(run: Run) -> bool:
    n = run.steps_per_epoch
    ends = (n * (k + 1) // EVALUATIONS_PER_EPOCH for k in range(EVALUATIONS_PER_EPOCH))
    return (run.step - 1) % n + 1 in ends


def _batches_from(run: Run, start: int) -> Iterator[np.ndarray]:
    size, seed, lengths = run.recipe.batch_size, run.recipe.seed, run.train.lengths
    for epoch in range(start // run.steps_per_epoch, run.recipe.epochs):
        rows = _text.batches(
            len(lengths), size, seed=seed, epoch=epoch, lengths=lengths
        )
        done = max(0, start - epoch * run.steps_per_epoch)
        yield from list(rows)[done:]


def _progress(run: Run) -> Any:
    size = run.recipe.batch_size
    return tqdm(
        total=run.steps * size,
        initial=run.step * size,
        unit=" examples",
        desc=run.name,
        dynamic_ncols=True,
        # A log that is no terminal gets a line now and then.
        mininterval=0.2 if sys.stderr.isatty() else 5,
    )


# ----------------------------------------------------------------- saved, merged, told


def make_logits(model: _bert.BertClassifier) -> Callable[..., jax.Array]:
    """(params, ids, mask) -> class scores, with any or no adapted leaves."""

    @jax.jit
    def logits(params, ids, mask):
        return jpeft.adapt(model.apply)({"params": params}, ids, mask)

    return logits


def work(run: Run, stop_after: int | None, full_summary: bool) -> None:
    """Trains, proves, reports, writes."""
    started, logits = time.perf_counter(), make_logits(run.model)
    print(_report.table(jpeft.summary(run.params), full=full_summary))
    print(
        f"\n{len(run.train)} examples to train on, {len(run.held_out)} held out, "
        f"{len(run.classes)} classes; {run.recipe.epochs} x {run.steps_per_epoch} steps"
    )
    if run.history["before"] is None:
        run.history["before"] = scores(run, logits)
    with _runs.Interrupt() as interrupt:
        start = f"resuming after step {run.step}" if run.step else "training"
        print(f"{start}; Ctrl-C saves a checkpoint and stops", flush=True)
        stop = lambda: interrupt.asked or run.step == stop_after
        speed = train(run, logits, stop)
    results = {
        "majority": majority(run),
        "before": run.history["before"],
        "after": scores(run, logits),
    }
    print(_report.results(results))
    count = jpeft.count(run.params)
    metrics = {
        "recipe": run.name,
        "settings": run.settings,
        "parameters": {"trainable": count.trainable, "frozen": count.frozen},
        "examples": {"train": len(run.train), "held_out": len(run.held_out)},
        **results,
        **save_and_prove(run, logits),
        "examples_per_second": round(speed, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "history": {k: run.history[k] for k in ("loss", "accuracy")},
    }
    _report.curves(run.out / _runs.CURVES, metrics, run.steps_per_epoch)
    _runs.write_json(run.out / _runs.METRICS, metrics)
    print(f"written  {run.out}: {_runs.ADAPTER}, {_runs.METRICS}, {_runs.CURVES}")
    print(f"time     {metrics['seconds']:.0f} s, {speed:.0f} examples/s in training")


def scores(run: Run, logits: Callable[..., jax.Array]) -> dict[str, float]:
    """Accuracy and macro-F1 on the held-out examples, as the parameters are now."""
    return _scores_of(run, _encoded.predict(logits, run.params, run.held_out).argmax(1))


def majority(run: Run) -> dict[str, float]:
    """As `scores`, of guessing the most frequent class."""
    guess = np.bincount(run.train.labels).argmax()
    return _scores_of(run, np.full_like(run.held_out.labels, guess))


def _scores_of(run: Run, found: np.ndarray) -> dict[str, float]:
    accuracy, f1 = _text.accuracy_f1(run.held_out.labels, found, len(run.classes))
    return {"accuracy": accuracy, "macro_f1": f1}


def save_and_prove(run: Run, logits: Callable[..., jax.Array]) -> dict[str, Any]:
    """Saves the adapter; Failed unless it can be loaded and merged."""
    adapter, subset = run.out / _runs.ADAPTER, run.subset
    jpeft.save(adapter, run.params, run.peft, step=run.step, overwrite=True)
    size, base_size = _report.size(adapter), _report.weights_size(run.base_folder)
    print(
        f"adapter  {adapter}: {_report.megabytes(size)}, "
        f"{100 * size / base_size:.2g}% of the base's {_report.megabytes(base_size)}"
    )
    weights = base_weights(run.params).values()
    in_memory = _report.stored(weights)
    in_few_bits = _report.stored(w for w in weights if is_quantized(w))
    if in_few_bits.parameters:
        print(_report.quantized(in_few_bits, in_memory))
    trained = _encoded.predict(logits, run.params, subset)

    head = keys(run.recipe.seed).head
    _, fresh = read_base(run.base_folder, len(run.classes), head)
    loaded = _encoded.predict(logits, jpeft.load(adapter, fresh), subset)
    reloaded = float(np.abs(loaded - trained).max())
    print(f"reload   onto a fresh base: max |difference of logits| {reloaded:g}")
    # Written so that nan, which compares as False, fails.
    if not reloaded == 0:
        raise Failed("the reloaded adapter does not give the logits it was saved with")

    return {
        "adapter_bytes": size,
        "base_bytes": base_size,
        "base_in_memory": in_memory._asdict(),
        "quantized": {**in_few_bits._asdict(), "bits": in_few_bits.bits},
        "reload_difference": reloaded,
        **merge_and_prove(run, logits, trained),
    }


def base_weights(params: Any) -> dict[str, Any]:
    """The encoder's weights under their adapters, by path; some may be quantised."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        jpeft.unload(params)["bert"], is_leaf=is_quantized
    )
    return {"/".join(k.key for k in path): weight for path, weight in flat}


def is_quantized(x: Any) -> bool:
    """Whether a weight is held in few bits."""
    return isinstance(x, jpeft.quant.Quantized)


def merge_and_prove(
    run: Run, logits: Callable[..., jax.Array], trained: np.ndarray
) -> dict[str, Any]:
    """Failed unless the merged weights give the logits of the adapted ones.

    Some methods have no merged weights; that is told.
    trained: those, as in training.  There a quantised base is multiplied in a dtype of
    its own, bfloat16 perhaps, and a merged one in the model's: what that moves is told,
    and merging is judged by logits in the model's.
    """
    subset, results = run.subset, {}
    if any(map(is_quantized, base_weights(run.params).values())):
        exact = _encoded.predict(logits, _in_model_dtype(run.params), subset)
        moved = float(np.abs(trained - exact).max())
        print(f"compute  in the quantised weights' dtype: moves logits by {moved:.2g}")
        lost = {
            "bfloat16": jpeft.quant.rounding(run.params, dtype=jnp.bfloat16),
            "requantized": jpeft.quant.rounding(run.params, requantize=True),
        }
        worst = {
            name: max((x.lost for x in weights.values()), default=0.0)
            for name, weights in lost.items()
        }
        print(_report.rounding(worst))
        results = {"compute_difference": moved, "rounding_over_change": worst}
        trained = exact
    try:
        plain_params = jpeft.merge(run.params)
    except TypeError as error:  # a prompt, say, is no change of a weight
        print(f"merge    {error}")
        return {"merge_difference": None, **results}
    plain = _encoded.predict(logits, plain_params, subset)
    merged = float(np.abs(plain - trained).max())
    print(f"merge    into the weights:  max |difference of logits| {merged:.2g}")
    if not merged <= MERGE_TOLERANCE:
        raise Failed(f"merging moves the logits by more than {MERGE_TOLERANCE:g}")
    return {"merge_difference": merged, **results}


def _in_model_dtype(params: Any) -> Any:
    """The same tree, whose quantised weights are multiplied as plain ones are."""
    one = lambda x: x.replace(compute_dtype=None) if is_quantized(x) else x
    return jax.tree.map(one, params, is_leaf=is_quantized)


# ------------------------------------------------------------------- the command line


def parser() -> argparse.ArgumentParser:
    """The options; those of the recipe have no default here."""
    options = argparse.ArgumentParser(
        description="Fine-tune a BERT checkpoint on text classification.",
        allow_abbrev=False,
        epilog="Options without a default here have it in the recipe's [train] table.",
    )
    add = options.add_argument
    add("--config", default="configs/lora.toml", help="the recipe (%(default)s)")
    add("--out", type=Path, help="folder of results (runs/<name of the recipe>)")
    add("--base", type=Path, help="Hugging Face BERT directory (all-MiniLM-L6-v2)")
    add("--data", type=Path, help=".tsv, .csv or .jsonl (docstrings of Python)")
    add("--eval", type=Path, help="held-out examples (a fifth of --data)")
    add(
        *("--validate",),
        type=float,
        metavar="X",
        help="hold out this part of the training examples instead, to choose settings",
    )
    add("--text-column", metavar="NAME", default="text", help="(%(default)s)")
    add("--label-column", metavar="NAME", default="label", help="(%(default)s)")
    _recipe.add_options(add)
    add("--max-train", type=positive, metavar="N", help="train on N examples only")
    add("--max-eval", type=positive, metavar="N", help="hold out N examples only")
    add("--full-summary", action="store_true", help="show the frozen weights too")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    return options


def positive(text: str) -> int:
    """A number of things, as an option."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return value


def main(argv: Sequence[str] | None = None, *, stop_after: int | None = None) -> int:
    """The command; after that many steps it does what it does after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    with _runs.sigterm_as_ctrl_c():
        return _main(args, argv, stop_after)


def _main(args: argparse.Namespace, argv: list[str], stop_after: int | None) -> int:
    try:
        run = prepare(args)
    except (ValueError, OSError, KeyError, SafetensorError) as error:
        # A KeyError's str() is the repr of its text.
        return _error(error.args[0] if isinstance(error, KeyError) else error, 2)
    except KeyboardInterrupt:
        return _error("interrupted before the training began", 130)
    try:
        work(run, stop_after, args.full_summary)
    except Failed as error:
        return _error(error, 1)
    except (_runs.Interrupted, KeyboardInterrupt):
        saved = run.manager.latest_step()
        print("\n" + _runs.how_to_resume(__file__, argv, saved), file=sys.stderr)
        return 130
    return 0


def _error(text: object, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
