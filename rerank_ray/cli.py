"""The command line: `rerank-ray COMMAND …`; `jobs/*.py` take the same arguments."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name

from rich.console import Console

from rerank_ray import __version__, storage
from rerank_ray.errors import ConfigError, RerankRayError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 only if every row is accounted for."""
    # Libraries announce every checkpoint they load; what matters is in this program's own messages.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = _parser().parse_args(arguments)
    # Off a terminal rich would wrap at 80 columns and break paths in two.
    # Ids and paths may have brackets, which are no markup.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
    try:
        options.command(options, console)
    except (RerankRayError, OSError) as error:
        return _failed(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on from what is finished")
        return 130
    except Exception as error:
        # Imported when something has failed: it takes a tenth of a second. pyarrow opens `hf://` with it.
        from httpx2 import TransportError

        if not isinstance(error, TransportError):
            raise
        return _failed(f"{error.request.url.host} can't be reached ({error}): look at the network, and start again")
    return 0


def _failed(error: Exception | str) -> int:
    Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rerank-ray", description="Batch reranking and distillation on Ray.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_ingest(commands)
    jobs = {
        "label": "score candidate lists with a teacher",
        "distill": "train a student on labels",
        "distill-rationales": "train a language model on teachers' reasoning and rankings",
        "reinforce": "train a language model on ranking rewards (GRPO)",
        "rerank": "rank candidate lists with any ranker",
        "synthesize": "write queries for passages of a collection",
        "pipeline": "run several jobs from one file",
    }
    for name, about in jobs.items():
        job = commands.add_parser(name, help=about, description=about)
        job.add_argument("config", metavar="CONFIG", help="YAML file")
        job.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value")
        job.add_argument("--run", metavar="FOLDER", help="run folder (default: runs/ and the config's name)")
        if name in ("label", "rerank", "synthesize", "pipeline"):
            whose = "" if name in ("label", "rerank") else ", where they made a step fail"
            job.add_argument("--retry-errors", action="store_true", help=f"do rows with `error` again{whose}")
        job.set_defaults(command=_JOBS[name])
    plan = commands.add_parser("plan", help="what a label or rerank job will take, from a sample of its rows")
    plan.add_argument("config", metavar="CONFIG", help="YAML file of the job")
    plan.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value")
    plan.add_argument("--run", metavar="FOLDER", help="the job's run folder (default: runs/ and the config's name)")
    plan.add_argument("--sample", type=int, default=16, metavar="ROWS", help="rows to rank (default: 16)")
    plan.add_argument("--gpus", type=_positive, metavar="N", help="GPUs there are (default: what the config asks for)")
    plan.add_argument("--price-per-hour", type=_positive, metavar="P", help="of one GPU; without GPUs, of one replica")
    plan.set_defaults(command=_plan)
    heads = commands.add_parser("detect-heads", help="find the attention heads that the method core_heads reads")
    heads.add_argument("config", metavar="CONFIG", help="YAML file")
    heads.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value")
    heads.set_defaults(command=_detect_heads)
    combine = commands.add_parser("combine", help="combine label runs to an ensemble")
    combine.add_argument("runs", nargs="+", metavar="RUN")
    combine.add_argument("--method", default="zscore", choices=["zscore", "minmax", "rrf", "borda", "kemeny"])
    combine.add_argument("--weights", type=float, nargs="+", metavar="W", help="one a run (default: all alike)")
    combine.add_argument("--out", required=True, metavar="FOLDER", help="run folder to write")
    combine.add_argument("--max-error-rate", type=float, metavar="R", help="rows with error that are accepted (0.05)")
    combine.set_defaults(command=_combine)
    _add_convert(commands)
    _add_evaluate(commands)
    _add_audit(commands)
    _add_prompt(commands)
    quickstart = commands.add_parser("quickstart", help="the whole path on a collection made on this machine")
    quickstart.add_argument("--run", metavar="FOLDER", help="runs/quickstart, or runs/quickstart-full")
    quickstart.add_argument("--full", action="store_true", help="as much on a slow processor as elsewhere")
    quickstart.set_defaults(command=_quickstart)
    return parser


def _add_ingest(commands) -> None:
    ingest = commands.add_parser("ingest", help="outside data to candidate Parquet")
    kinds = ingest.add_subparsers(required=True, metavar="KIND")
    beir = kinds.add_parser("beir", help="a BEIR folder; BM25 is the first stage")
    beir.add_argument("folder", metavar="DIR")
    beir.add_argument("--split", help="qrels/SPLIT.tsv names the queries (default: all queries, no gains)")
    beir.add_argument("--depth", type=int, default=100, help="candidates a query (default: 100)")
    beir.add_argument("--k1", type=float, default=0.9)
    beir.add_argument("--b", type=float, default=0.4)
    hits = kinds.add_parser("hits", help="RankGPT or RankLLM hits: JSON, JSONL, .gz")
    hits.add_argument("files", nargs="+", metavar="FILE")
    hits.add_argument("--qrels", metavar="FILE")
    hits.add_argument("--depth", type=int, help="candidates a query (default: all)")
    trec = kinds.add_parser("trec", help="a TREC run, topics and a collection")
    rank_distillm = kinds.add_parser("rank-distillm", help="a teacher's TREC run: its ranks become labels")
    for parser in (trec, rank_distillm):
        for name in ("run", "queries", "corpus"):
            parser.add_argument(f"--{name}", required=True, metavar="FILE")
        parser.add_argument("--qrels", metavar="FILE")
        parser.add_argument("--depth", type=int, help="candidates a query (default: all)")
    lists = {
        "flagembedding": kinds.add_parser("flagembedding", help="FlagEmbedding's JSONL; becomes labels"),
        "sentence-transformers": kinds.add_parser("sentence-transformers", help="labelled lists; become labels"),
        "margin-mse": kinds.add_parser("margin-mse", help="sentence-transformers' margin triplets; become labels"),
        "tevatron": kinds.add_parser("tevatron", help="Tevatron's JSONL; becomes labels"),
        "triples": kinds.add_parser("triples", help="MS MARCO triples (TSV) of texts or ids; become labels"),
    }
    for parser in lists.values():
        parser.add_argument("files", nargs="+", metavar="FILE")
        parser.add_argument("--depth", type=int, help="candidates a query, positives first (default: all)")
    for name in ("queries", "corpus"):
        lists["triples"].add_argument(f"--{name}", metavar="FILE", help="for triples of ids")
    merge = kinds.add_parser("merge", help="candidate Parquet of several first stages over the same queries")
    merge.add_argument("inputs", nargs="+", metavar="CANDIDATES", help="Parquet folder or ingest run")
    merge.add_argument("--method", default="rrf", choices=["rrf", "interleave"], help="order of the merged list")
    merge.add_argument("--depth", type=int, help="candidates a query (default: all)")
    training = {"rank-distillm": rank_distillm, **lists}
    for parser in (beir, hits, trec, *training.values()):
        parser.add_argument("--instruction", help="task instruction for instruction-following models")
        parser.add_argument("--skip-bad-lines", action="store_true", help="count and list bad lines, don't stop")
    for kind, parser in {"beir": beir, "hits": hits, "trec": trec, "merge": merge, **training}.items():
        parser.add_argument("--out", required=True, metavar="URI", help="folder for Parquet")
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier ingest in OUT")
        parser.set_defaults(command=_ingest, kind=kind)


def _add_convert(commands) -> None:
    convert = commands.add_parser("convert", help="labels to the training data of other projects")
    convert.add_argument("source", metavar="RUN", help="label run, or Parquet of labels or candidates")
    forms = ["flagembedding", "sentence-transformers", "margin-mse", "tevatron", "triples", "rank-distillm"]
    convert.add_argument("--format", required=True, choices=forms, dest="form")
    convert.add_argument("--out", required=True, metavar="FILE", help="JSONL or TSV (.gz too); rank-distillm: a folder")
    convert.add_argument("--target", choices=["teacher", "gains"], help="numbers to write (default: teacher's, if any)")
    convert.add_argument("--min-gain", type=float, metavar="G", help="gain from which on a candidate is a positive (1)")
    convert.add_argument("--positives", type=int, metavar="N", help="instead: the teacher's first N are positives")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT")
    convert.set_defaults(command=_convert)


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser("evaluate", help="rankings against qrels")
    evaluate.add_argument(
        "rankings", nargs="+", metavar="RANKINGS", help="run folder, candidate Parquet or TREC run; NAME=PATH names it"
    )
    evaluate.add_argument("--qrels", required=True, metavar="FILE", help="TREC qrels or BEIR TSV")
    evaluate.add_argument("--metrics", metavar="M,M,…", help="default: ndcg@10,mrr@10,map,recall@100")
    evaluate.add_argument("--json", metavar="FILE", help="also write everything, per-query values included")
    evaluate.add_argument("--per-query", metavar="FILE", help="also write a TSV: query_id, metric, a column a system")
    evaluate.set_defaults(command=_evaluate)


def _add_audit(commands) -> None:
    audit = commands.add_parser(
        "audit", help="what a label run is worth: scores, defects, bias, agreement, calibration"
    )
    audit.add_argument("label_run", metavar="RUN", help="label run folder or label Parquet")
    audit.add_argument("--against", nargs="+", default=[], metavar="RUN", help="label runs of other teachers")
    audit.add_argument("--shuffled", metavar="RUN", help="the same teacher's run over `rerank-ray shuffle`'s output")
    audit.add_argument("--repeat", metavar="RUN", help="the same teacher's second run over the same input")
    audit.add_argument("--qrels", metavar="FILE", help="TREC qrels or BEIR TSV (default: the candidates' own labels)")
    audit.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    audit.set_defaults(command=_audit)
    shuffle = commands.add_parser("shuffle", help="candidate lists in random order, to find a teacher's position bias")
    shuffle.add_argument("input", metavar="INPUT", help="candidate Parquet or run folder")
    shuffle.add_argument("--seed", type=int, default=0, metavar="N")
    shuffle.add_argument("--out", required=True, metavar="URI", help="folder for candidate Parquet")
    shuffle.add_argument("--overwrite", action="store_true", help="replace an earlier one in OUT")
    shuffle.set_defaults(command=_shuffle)
    export = commands.add_parser("export", help="a trained student for use elsewhere, with a model card")
    export.add_argument("student", metavar="STUDENT", help="its folder")
    export.add_argument("--out", required=True, metavar="FOLDER")
    forms = ["transformers", "onnx", "flagembedding-layerwise"]
    export.add_argument("--format", choices=forms, default="transformers", dest="form")
    export.add_argument("--layer", type=int, metavar="N", help="of a layer-wise student (default: the last)")
    export.add_argument("--int8", action="store_true", help="onnx: weights as 8-bit integers, for CPUs")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export in FOLDER")
    export.set_defaults(command=_export)
    exits = commands.add_parser("calibrate-exit", help="when a layer-wise student may stop early, for a stated loss")
    exits.add_argument("student", metavar="STUDENT", help="its folder, which takes the margins")
    exits.add_argument("--labels", metavar="RUN", help="other label run (default: what its distillation run held out)")
    exits.add_argument("--max-loss", type=float, required=True, metavar="L", help="nDCG@10 that may be lost on average")
    exits.add_argument("--gains", choices=["teacher", "labels"], default="teacher", help="what nDCG@10 is against")
    exits.add_argument("--limit", type=int, metavar="N", help="read so many rows at most")
    exits.set_defaults(command=_calibrate_exit)
    selectivity = commands.add_parser("selectivity", help="the threshold of selective reranking that keeps to a budget")
    selectivity.add_argument("label_run", metavar="RUN", help="label run of the cheap ranker")
    selectivity.add_argument("--budget", type=float, required=True, metavar="SHARE", help="of the queries, 0 to 1")
    selectivity.add_argument("--k", type=int, required=True, help="as the config's `k`")
    selectivity.add_argument("--criterion", default="entropy", choices=["entropy", "margin"], help="as the config's")
    selectivity.set_defaults(command=_selectivity)


def _add_prompt(commands) -> None:
    prompt = commands.add_parser("prompt", help="templates, and what a model will see of one")
    actions = prompt.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print exactly what the model will see for one row")
    show.add_argument("template", metavar="TEMPLATE", help="built-in name or YAML file")
    show.add_argument("--row", required=True, metavar="INPUT[:QUERY_ID]", help="candidate Parquet (default: first row)")
    show.add_argument("--model", metavar="PATH", help="apply this model's tokenizer: chat template, cuts, token count")
    show.add_argument("--call", type=int, metavar="N", help="of the query's calls (default: first with a passage)")
    show.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of the method or model")
    show.set_defaults(command=_prompt_show)
    actions.add_parser("list", help="the built-in templates").set_defaults(command=_prompt_list)


def _ingest(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.execution.pipeline import INGESTS, print_ingest

    arguments = {k: v for k, v in vars(options).items() if k not in ("command", "kind")}
    print_ingest(INGESTS[options.kind](**arguments), console)


def _job(settings: str, function: str) -> Callable[[argparse.Namespace, Console], None]:
    """A command that loads a config and hands it to a job; imports wait until a command needs them."""

    def command(options: argparse.Namespace, console: Console) -> None:
        from rerank_ray import config

        loaded = config.load(resolve_name(f"rerank_ray.settings.{settings}"), options.config, options.set)
        extra = {"retry_errors": options.retry_errors} if hasattr(options, "retry_errors") else {}
        resolve_name(f"rerank_ray.execution.{function}")(loaded, _run_folder(options), console, **extra)

    return command


def _run_folder(options: argparse.Namespace) -> str:
    folder = options.run or f"runs/{Path(options.config).stem}"
    # A pipeline's steps note each other's folders: spelled another way they would be other ones.
    return folder if "://" in folder else os.path.normpath(folder)


_JOBS = {
    "label": _job("jobs:LabelSettings", "jobs:label"),
    "distill": _job("distill:DistillSettings", "training_jobs:distill"),
    "distill-rationales": _job("rationale:RationaleSettings", "training_jobs:distill_rationales"),
    "reinforce": _job("reinforce:ReinforceSettings", "training_jobs:reinforce"),
    "rerank": _job("jobs:RerankSettings", "jobs:rerank"),
    "synthesize": _job("synthesize:SynthesizeSettings", "synthesis_job:synthesize"),
    "pipeline": _job("pipeline:PipelineSettings", "pipeline:run_pipeline"),
}


def _values(options: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(options, name) for name in names}


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _plan(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.planning import load_job, plan, print_forecast

    settings = load_job(options.config, options.set)
    forecast = plan(settings, _run_folder(options), sample=options.sample)
    print_forecast(forecast, settings.execution, console, gpus=options.gpus, price_per_hour=options.price_per_hour)


def _detect_heads(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray import config
    from rerank_ray.ranking.head_detection import detect_heads
    from rerank_ray.ranking.heads_file import save_heads
    from rerank_ray.settings.jobs import DetectHeadsSettings

    settings = config.load(DetectHeadsSettings, options.config, options.set)
    detection = detect_heads(settings)
    save_heads(settings.output, detection.heads)
    for reason, count in detection.skipped.items():
        console.print(f"{count} queries left out: {reason}")
    best = ", ".join(f"{h.layer}.{h.head} ({h.score:.3f})" for h in detection.heads.heads[:8])
    console.print(f"{settings.output}: {detection.heads.queries} queries; best heads (layer.head): {best}")


def _combine(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray import config
    from rerank_ray.execution.jobs import combine_runs
    from rerank_ray.settings.jobs import CombineSettings

    content = {"inputs": options.runs, "method": options.method, "weights": options.weights}
    if options.max_error_rate is not None:
        content["limits"] = {"max_error_rate": options.max_error_rate}
    combine_runs(config.validate(CombineSettings, content, source="combine"), options.out, console)


def _convert(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.convert import convert

    done = convert(**_values(options, "source", "out", "form", "target", "min_gain", "positives", "overwrite"))
    console.print(f"{options.out}: {done.lists:,} lists, {done.candidates:,} candidates", highlight=False)
    for reason, count in done.skipped.items():
        console.print(f"  {count:,} rows left out: {reason}", highlight=False)
    if done.unscored:
        console.print(f"  {done.unscored:,} candidates left out: the teacher gave them no score", highlight=False)
    if done.repeated:
        reason = "another one of their list has the same text"
        console.print(f"  {done.repeated:,} candidates left out: {reason}", highlight=False)
    if done.empty:
        console.print(f"  {done.empty:,} candidates left out: they have no text", highlight=False)


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.evaluate import DEFAULT_METRICS, evaluate_sources, print_report

    metrics = options.metrics.split(",") if options.metrics else DEFAULT_METRICS
    if options.json and options.json == options.per_query:
        raise ConfigError(f"{options.json}: --json and --per-query name one file: name two")
    for file in filter(None, (options.json, options.per_query)):
        storage.check_writable(file)
    report = evaluate_sources(options.rankings, qrels=options.qrels, metrics=metrics)
    print_report(report, console)
    if options.json:
        storage.write_text(options.json, json.dumps(report.to_dict(), indent=1) + "\n")
    if options.per_query:
        storage.write_text(options.per_query, report.per_query_tsv())


def _audit(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.audit import audit, print_audit

    if options.json:
        storage.check_writable(options.json)
    report = audit(options.label_run, **_values(options, "against", "shuffled", "repeat", "qrels"))
    print_audit(report, console)
    if options.json:
        storage.write_text(options.json, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _shuffle(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.shuffle import shuffle

    rows = shuffle(options.input, options.out, options.seed, overwrite=options.overwrite)
    console.print(f"{options.out}: {rows:,} rows, candidates shuffled with seed {options.seed}", highlight=False)


def _selectivity(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.selectivity import threshold_for

    found = threshold_for(options.label_run, options.budget, options.k, options.criterion)
    share = f"{found.selected:,} of {found.queries:,} queries ({found.selected / found.queries:.1%})"
    console.print(f"threshold: {found.threshold!r}", highlight=False)
    console.print(f"sends {share} to the expensive ranker, k {options.k}, {options.criterion}", highlight=False)


def _calibrate_exit(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.calibrate_exit import calibrate_exit

    report = calibrate_exit(**_values(options, "student", "labels", "max_loss", "gains", "limit"))
    found = report.calibration
    for number, layer in enumerate(report.layers):
        told = f"layer {layer}: nDCG@10 {report.ndcg[number]:.4f}, {found.left[number]:.0%} of the candidates leave"
        if layer != report.layers[-1]:
            margin = found.margins[number]
            told += ": not tried" if margin is None else f", {margin:.4f} and more below their list's tenth score"
        console.print(told, highlight=False)
    lost = f"{found.loss:.4f}, below {found.loss_bound:.4f} with some 90 % confidence by Student's t"
    lost += f" ({report.lists} lists, of which {found.losing:.0%} lose anything: the fewer, the less it says)"
    computed = f"{found.layers_computed:.2f} of {report.layers[-1]} layers are computed"
    console.print(f"{computed}; nDCG@10 lost: {lost}", highlight=False)


def _export(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.export import export

    export(**_values(options, "student", "out", "form", "layer", "int8", "overwrite"))
    console.print(options.out, highlight=False)


def _prompt_show(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.prompt import show

    shown = show(options.template, options.row, model=options.model, overrides=options.set, number=options.call)
    console.out(shown.text, highlight=False)
    # Beside the prompt, so that the output can be piped.
    for fact in shown.facts:
        Console(stderr=True, soft_wrap=True).print(f"# {fact}", markup=False, highlight=False)


def _prompt_list(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.prompts.render import builtin_templates
    from rerank_ray.report.tables import print_table

    rows = {name: {"method": t.method, "about": t.about} for name, t in builtin_templates().items()}
    print_table(rows, console, head="template")


def _quickstart(options: argparse.Namespace, console: Console) -> None:
    from rerank_ray.quickstart.run import quickstart

    # The small collection's run can't go on as the whole one's.
    folder = options.run or ("runs/quickstart-full" if options.full else "runs/quickstart")
    quickstart(Path(folder), console, full=options.full)


if __name__ == "__main__":
    sys.exit(main())
