"""Commands: train, resume, deploy, quickstart, and run for PAI scripts."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.format import Checkpoint, pairs, say_next
from palate_recipes.text import visible

if TYPE_CHECKING:
    from palate.estimate import Estimate


def train(
    data: Annotated[
        str | None,
        typer.Argument(
            help="Preference data: a file, folder, glob or URI (s3://, oss://, hf://, gsheet://); see docs/data.md. "
            "Default: the recipe file's."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name; `palate models` lists them.")] = None,
    model_uri: Annotated[
        str | None, typer.Option(help="Folder or object-store URI of a model, instead of --model.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="LoRA_LLM (default), QLoRA_LLM or Standard_LLM (full fine-tuning).")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="The hyperparameter training_strategy: dpo (default), kto or sft.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Preference data for validation.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Model folder of a finished LoRA job to continue from, such as SFT before DPO.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="NAME=VALUE",
            help="Set a hyperparameter; repeat for more. `palate models --hyperparameters` lists them.",
        ),
    ] = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="TOML file with model, method, hyperparameters and data.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Job id. Default: a unique one.")] = None,
    max_run_time: Annotated[int | None, typer.Option(help="Time limit of one attempt in seconds.")] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Maximum number of attempts; each continues from the last checkpoint.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Backend. Default: the session's.")] = None,
    store: Annotated[
        str | None, typer.Option(help="Folder or bucket for the job. Default: the recipe file's, else PALATE_STORE.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print an estimate; submit nothing.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(help="With --dry-run: what an hour of the device costs, in any currency.")
    ] = None,
    servable: Annotated[bool, typer.Option(help="Reject a training whose result no engine could serve.")] = True,
    wait: Annotated[bool, typer.Option(help="Wait until the job has ended, and show progress.")] = True,
) -> None:
    """Train a model on preference data and print the job's id."""
    from palate.model import ModelTrainingRecipe
    from palate.session import Session, get_default_session
    from palate_recipes.errors import ConfigurationError
    from palate_recipes.recipe_file import read_recipe_file

    file = read_recipe_file(recipe_file) if recipe_file else None
    settings: dict[str, Any] = dict(file.arguments) if file else {}
    hyperparameters: dict[str, Any] = {**settings.pop("hyperparameters", {})}
    # The command line wins over the file. The default strategy of this command is DPO.
    if strategy or "training_strategy" not in hyperparameters:
        hyperparameters["training_strategy"] = strategy or "dpo"
    hyperparameters.update(pairs(set_ or [], "--set"))
    if model or model_uri:
        settings.update(model_name=model, model_uri=model_uri)
    for key, value in (("method", method), ("max_run_time", max_run_time), ("max_attempts", max_attempts)):
        if value is not None:
            settings[key] = value
    if not (settings.get("model_name") or settings.get("model_uri")):
        raise ConfigurationError(
            "no model given: add --model NAME (`palate models` lists them), --model-uri FOLDER, or --recipe FILE with "
            "model_name. A small model for a first try on any machine: --model smollm2-135m-instruct"
        )
    flags = {"train": data, "validation": validation, "adapter": adapter}
    given = {channel: uri for channel, uri in flags.items() if uri}
    inputs: dict[str, str] = {**settings.pop("default_training_inputs", {}), **given}
    if "train" not in inputs:
        where = (
            f", or a line `train = …` to {recipe_file}" if recipe_file else ", or --recipe FILE with a line `train = …`"
        )
        raise ConfigurationError(f"no training data given: add DATA, a file, folder, glob or URI{where}")
    store = store or (file.store if file else None)
    session = Session(store=store) if store else None
    recipe = ModelTrainingRecipe(**settings, hyperparameters=hyperparameters, backend=backend, session=session)
    job_name = file.name if file and name is None else name
    if dry_run:
        found = recipe.estimate(inputs, job_name=job_name, servable=servable, price_per_hour=price_per_hour)
        print_estimate(found)
        return
    if price_per_hour is not None:
        raise ConfigurationError("--price-per-hour is for the estimate: add --dry-run, or omit it")
    job = recipe.train(inputs=inputs, wait=wait, job_name=job_name, servable=servable)
    print(job.id)
    is_elsewhere = recipe.session.store_uri != get_default_session().store_uri
    say_next("deploy" if wait else "watch", job.id, store=recipe.session.store_uri if is_elsewhere else None)


def print_estimate(found: Estimate) -> None:
    """Prints an estimate as a table, problems to stderr. Exits with 1 if the training would be rejected."""
    from palate.ui.terminal import Column, print_table
    from palate_recipes.specs.events import duration

    def number(value: int | None, unit: str = "") -> str:
        return "not known" if value is None else f"{value:,}{unit}"

    time = "not known: no succeeded job in this store has this model, method and device"
    if found.tokens is None:
        time = "not known without token counts"
    elif found.seconds and found.tokens_per_s:
        between = [
            first if first == last else f"{first} to {last}"
            for first, last in (map(duration, found.seconds), (f"{rate:,.0f}" for rate in found.tokens_per_s))
        ]
        sources = found.rate_source
        time = (
            f"{between[0]} of training, at {between[1]} tokens/s of {len(sources)} earlier "
            f"{'job' if len(sources) == 1 else 'jobs'} ({', '.join(sources[:3])}{', …' if len(sources) > 3 else ''})"
        )

    def known(text: str, *values: int | None) -> str:
        return "not known" if all(value is None for value in values) else text

    bound, peak = found.memory_gib, found.peak_memory_gib
    # The bound's share of the libraries is a round figure: of a tiny model it is above the peak.
    shown = [f"at least {bound:.1f} GiB"] if bound is not None and (peak is None or bound < peak) else []
    shown += [] if peak is None else [f"expected peak {peak:.1f} GiB"]
    needed = ", ".join(shown) or "not known"
    rows = [
        (
            "rows",
            known(f"{number(found.rows)} usable, {number(found.skipped_rows)} skipped", found.rows, found.skipped_rows),
        ),
        ("tokens", known(f"{number(found.tokens)} per epoch", found.tokens)),
        (
            "row length",
            known(
                f"median {number(found.median_row)}, longest {number(found.longest_row)} tokens",
                found.median_row,
                found.longest_row,
            ),
        ),
        (
            f"at seq_length={found.seq_length}",
            known(
                f"{number(found.truncated_rows)} rows truncated, {number(found.dropped_rows)} dropped",
                found.truncated_rows,
                found.dropped_rows,
            ),
        ),
        ("optimizer steps", number(found.steps)),
        ("memory", f"{needed}; the device has {found.memory_available_gib:.1f} GiB"),
        ("runs on", f"{found.backend} backend, {found.device}, {found.precision}"),
        ("time", time),
        *((("price", " to ".join(sorted({f"{value:.2f}" for value in found.price}))),) if found.price else ()),
        *(("" if index else "serving", line) for index, line in enumerate(found.serving)),
    ]
    print_table(("what", Column("estimate", wraps=True)), rows)
    for level, texts in (("warning", found.warnings), ("error", found.errors)):
        for text in texts:
            print(visible(f"{level}: {text}"), file=sys.stderr)
    if found.errors:
        raise typer.Exit(1)
    print("nothing was submitted; the same command without --dry-run trains", file=sys.stderr)


def resume(
    name: Annotated[str, typer.Argument(help="Id of a failed or stopped job.")],
    wait: Annotated[bool, typer.Option(help="Wait until the job has ended, and show progress.")] = True,
) -> None:
    """Continue a failed or stopped job from its last checkpoint."""
    from palate.job import TrainingJob

    job = TrainingJob.get(name).resume(wait=wait)
    print(job.id)
    say_next("deploy" if wait else "watch", job.id)


def deploy(
    job_id: Annotated[str, typer.Argument(help="Id or URI of a job, or a model name with --base.")],
    name: Annotated[
        str | None, typer.Option(help="Service name. Default: the job id with -service, or with the checkpoint's name.")
    ] = None,
    checkpoint: Checkpoint = None,
    base: Annotated[bool, typer.Option("--base", help="Serve an untuned model of the catalog.")] = False,
    engine: Annotated[str, typer.Option(help="Serving engine: auto, vllm or transformers.")] = "auto",
    port: Annotated[int, typer.Option(help="Port to bind; 0 chooses a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    instances: Annotated[
        int, typer.Option(help="Number of engines, each with its own copy of the model; `palate scale` changes it.")
    ] = 1,
    max_instances: Annotated[
        int | None,
        typer.Option(help="Scale the engines with the open requests, up to this number. Default: no scaling."),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context length in tokens.")] = None,
    time_to_live: Annotated[float | None, typer.Option(help="Stop the service after this many seconds.")] = None,
    idle_time_to_live: Annotated[
        float | None,
        typer.Option(help="Stop the service after this many seconds without a request. Default: never."),
    ] = None,
    sleep_after: Annotated[
        float | None,
        typer.Option(
            help="End the engines after this many seconds without a request, until the next one. Default: never."
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(help="How often within ten minutes an engine that ended by itself is started again.")
    ] = 3,
    dtype: Annotated[
        str, typer.Option(help="Compute type: auto (that of the weights), bfloat16, float16 or float32.")
    ] = "auto",
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into its base and serve one model, without 'base'.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file to use instead of the model's chat template.")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="vLLM: how to quantise the weights, such as fp8.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="vLLM: type of the KV cache, such as fp8.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="vLLM: GPUs that share the model.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="vLLM: share of the GPU's memory to use, above 0 and at most 1.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="vLLM: requests that it computes at once.")] = None,
    max_loras: Annotated[int | None, typer.Option(help="vLLM: adapters in one batch.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="vLLM: largest rank of an adapter.")] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="vLLM: parser of tool calls, or none. Default: by the model.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="vLLM: parser of thoughts, or none. Default: by the model.")
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(help="An option of vLLM as NAME=VALUE, or NAME for a switch, such as max-num-seqs=8. Repeatable."),
    ] = None,
    verify: Annotated[
        str, typer.Option(help="If it does not answer as the trained model: error, warn, or off (do not compare).")
    ] = "error",
    require_win_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Deploy only if an evaluation of exactly this model has a win-rate whose 95% interval begins here or above.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the service answers.")] = True,
    show_logs: Annotated[bool, typer.Option(help="Show the engine's log while waiting.")] = False,
) -> None:
    """Serve a job's model behind an OpenAI-compatible endpoint.

    With --checkpoint also a job that still trains. Prints the service's name and endpoint.
    """
    from palate.common.utils import check_name
    from palate.job import TrainingJob
    from palate.model import RegisteredModel
    from palate_recipes.catalog import find_model
    from palate_recipes.errors import ConfigurationError, RunNotFoundError, UnknownModelError
    from palate_recipes.specs.serve import engine_args_of

    options: dict[str, Any] = {"engine": engine, "port": port, "host": host, "idle_time_to_live_s": idle_time_to_live}
    if not base:
        options["verify"] = verify
    typed = {
        "max_model_len": max_model_len,
        "chat_template": chat_template,
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_num_seqs": max_num_seqs,
        "max_loras": max_loras,
        "max_lora_rank": max_lora_rank,
        "tool_call_parser": tool_call_parser,
        "reasoning_parser": reasoning_parser,
    }
    options |= {name: value for name, value in typed.items() if value is not None}
    if dtype != "auto":
        options["dtype"] = dtype
    if merge:
        options["merge"] = True
    if time_to_live is not None:
        options["time_to_live_s"] = time_to_live
    if sleep_after is not None:
        options["sleep_after_s"] = sleep_after
    if restarts != 3:
        options["restarts"] = restarts
    if max_instances is not None:
        options["autoscaling"] = {"max_instances": max_instances}
    if engine_arg:
        options["engine_args"] = engine_args_of(engine_arg)
    if name is not None:
        check_name("service name", name)
    more: dict[str, Any] = {
        "options": options,
        "instance_count": instances,
        "wait": wait,
        "show_logs": show_logs,
    }
    if not base:
        try:
            job = TrainingJob.get(job_id)
        except RunNotFoundError as error:
            with suppress(UnknownModelError):
                find_model(job_id)
                raise RunNotFoundError(f"{error}. To serve the untuned model of this name add --base") from None
            raise
        predictor = job.deploy(name, checkpoint=checkpoint, require_win_rate=require_win_rate, **more)
    elif require_win_rate is not None:
        raise ConfigurationError(
            "--require-win-rate needs the evaluation of a job, and --base serves an untuned model: omit one of them"
        )
    elif checkpoint is None:
        model = RegisteredModel(job_id)
        own = model.model_name.rpartition("/")[2][:80]  # a hub id has an owner, and a name at most 100 characters
        predictor = model.deploy(f"{own}-base" if name is None else name, **more)
    else:
        raise ConfigurationError("--checkpoint is of a job, and --base serves a model of the catalog: omit one of them")
    print(f"{predictor.service_name}\t{predictor.endpoint if wait else 'Creating'}")
    say_next("chat" if wait else "show", predictor.service_name)


QUICKSTART_HELP = """Train a small model not to flatter, and compare it.

It and its base answer the same questions.

The same in Python, from a local file that `palate data demo --per-topic 2` writes:

\b
  from palate import ModelTrainingRecipe

\b
  recipe = ModelTrainingRecipe(
      model_name="smollm2-135m-instruct",
      method="LoRA_LLM",
      hyperparameters={
          "training_strategy": "dpo",
          "loss_type": "sigmoid,sft",  # DPO plus the likelihood of the chosen answer
          "learning_rate": 1e-3,
          "per_device_train_batch_size": 4,  # 68 pairs: 17 steps
          "gradient_accumulation_steps": 1,
      },
  )
  recipe.train(inputs={"train": "palate-demo/train.json"})
  predictor = recipe.deploy(service_name="smollm2_example")
  answer = predictor.openai().chat.completions.create(
      model="default",
      messages=[
          {"role": "system", "content": recipe.hyperparameters["system_prompt"]},  # as in training
          {"role": "user", "content": "Chess is pure talent, so practice is a waste of time, right?"},
      ],
      max_tokens=80,
      temperature=0,
  )
  print(answer.choices[0].message.content)
  predictor.delete_service()

With data in S3 or an S3-compatible bucket, and a model from the Hugging Face hub:

\b
  recipe = ModelTrainingRecipe(
      model_name="qwen2-0.5b-instruct", method="LoRA_LLM", hyperparameters={"training_strategy": "dpo"}
  )
  recipe.train(inputs={"train": "s3://bucket/prefs.json"})
  predictor = recipe.deploy(service_name="qwen2_example")
"""


def quickstart(
    folder: Annotated[Path, typer.Option(help="Folder for data and results.")] = Path("palate-quickstart"),
    direction: Annotated[str, typer.Option(help="Preferred answers: honest, flattering, blunt or gentle.")] = "honest",
    engine: Annotated[str, typer.Option(help="Serving engine: auto, vllm or transformers.")] = "auto",
) -> None:
    from palate.quickstart import run_quickstart

    job = run_quickstart(folder, direction=direction, engine=engine)
    say_next("deploy", job.id)


def run(
    script: Annotated[str, typer.Argument(help="Python script written for PAI's SDK; - reads it from stdin.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the script, passed on unchanged.")] = None,
) -> None:
    """Run a script written for PAI's SDK, unchanged.

    Like `python SCRIPT`, with `import pai` resolved to Palate.
    """
    from palate.pai import run_script

    run_script(script, arguments or [])


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    for verb in (train, resume, deploy):
        app.command()(verb)
    app.command(help=QUICKSTART_HELP)(quickstart)
    # Arguments after the script belong to the script, options included.
    app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(run)
