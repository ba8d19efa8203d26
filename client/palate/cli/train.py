"""Commands: train, resume, deploy, chat, quickstart, and run for PAI scripts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from palate.cli.format import pairs
from palate_recipes.text import visible


def train(
    data: Annotated[
        str,
        typer.Argument(
            help="Preference data: a file, folder, glob or URI (s3://, oss://, hf://, gsheet://); see docs/data.md."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Name from `palate models`.")] = None,
    model_uri: Annotated[
        str | None, typer.Option(help="Folder or object-store URI of a model, instead of --model.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="LoRA_LLM (default), QLoRA_LLM or Standard_LLM (full fine-tuning).")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="The hyperparameter training_strategy: dpo (default), kto or sft.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Preference data for evaluation.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Model folder of a finished LoRA run to continue from, such as SFT before DPO.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="NAME=VALUE",
            help="A hyperparameter; can be repeated. `palate models --hyperparameters` lists them.",
        ),
    ] = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="TOML file with model, method and hyperparameters.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Job id; default: a unique one.")] = None,
    max_run_time: Annotated[int | None, typer.Option(help="Time limit of the training in seconds.")] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Maximum number of attempts; a retry continues from the last checkpoint.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Backend; default: the session's.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end and show progress.")] = True,
) -> None:
    """Train a model on preference data; prints the job's id."""
    from palate.model import ModelTrainingRecipe
    from palate_recipes.recipe_file import read_recipe

    settings: dict[str, Any] = read_recipe(recipe_file) if recipe_file else {}
    hyperparameters: dict[str, Any] = {**settings.pop("hyperparameters", {})}
    # Options override the recipe file. Without a strategy in either, the command uses DPO.
    if strategy or "training_strategy" not in hyperparameters:
        hyperparameters["training_strategy"] = strategy or "dpo"
    hyperparameters.update(pairs(set_ or [], "--set"))
    if model or model_uri:
        settings.update(model_name=model, model_uri=model_uri)
    for key, value in (("method", method), ("max_run_time", max_run_time), ("max_attempts", max_attempts)):
        if value is not None:
            settings[key] = value
    recipe = ModelTrainingRecipe(**settings, hyperparameters=hyperparameters, backend=backend)
    given = {"train": data, "validation": validation, "adapter": adapter}
    inputs = {channel: uri for channel, uri in given.items() if uri}
    job = recipe.train(inputs=inputs, wait=wait, job_name=name)
    print(job.id)
    following = f"palate deploy {job.id}" if wait else f"palate watch {job.id}"
    print(f"next: {following}", file=sys.stderr)


def resume(
    name: Annotated[str, typer.Argument(help="Id of a failed or stopped job.")],
    wait: Annotated[bool, typer.Option(help="Wait for the end and show progress.")] = True,
) -> None:
    """Continue a failed or stopped job from its last complete checkpoint."""
    from palate.job import TrainingJob

    job = TrainingJob.get(name).resume(wait=wait)
    print(job.id)
    print(f"next: palate {'deploy' if wait else 'watch'} {job.id}", file=sys.stderr)


def deploy(
    job_id: Annotated[str, typer.Argument(help="Id or URI of a succeeded job; with --base a model name.")],
    name: Annotated[str | None, typer.Option(help="Service name; default: derived from the job.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Serve a catalog model without tuning.")] = False,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
    port: Annotated[int, typer.Option(help="Port; 0 selects a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    max_model_len: Annotated[int | None, typer.Option(help="Context length in tokens.")] = None,
    time_to_live: Annotated[float | None, typer.Option(help="Stop the service after this many seconds.")] = None,
    idle_time_to_live: Annotated[
        float | None,
        typer.Option(help="Stop the service after this many seconds without a request; default: never."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it answers.")] = True,
    show_logs: Annotated[bool, typer.Option(help="Show the engine's log while waiting.")] = False,
) -> None:
    """Serve a job's model behind an OpenAI-compatible endpoint; prints name and endpoint."""
    from palate.job import TrainingJob
    from palate.model import RegisteredModel

    options: dict[str, Any] = {"engine": engine, "port": port, "host": host, "idle_time_to_live_s": idle_time_to_live}
    if max_model_len is not None:
        options["max_model_len"] = max_model_len
    if time_to_live is not None:
        options["time_to_live_s"] = time_to_live
    source: RegisteredModel | TrainingJob
    if base:
        source = RegisteredModel(job_id)
    else:
        source = TrainingJob.get(job_id)
        source.require_model()
    service_name = name or f"{job_id}-{'base' if base else 'service'}"
    if wait:
        print(f"starting {service_name}; `palate logs -f {service_name}` shows the engine's log", file=sys.stderr)
    predictor = source.deploy(service_name, options=options, wait=wait, show_logs=show_logs)
    print(f"{predictor.service_name}\t{predictor.endpoint if wait else 'Creating'}")
    print(f"next: palate chat {predictor.service_name}", file=sys.stderr)


def chat(
    service: Annotated[str, typer.Argument(help="Service name.")],
    message: Annotated[
        str | None, typer.Argument(help="One message; without it, a conversation from the terminal or stdin.")
    ] = None,
    model: Annotated[str, typer.Option(help="default (tuned) or base.")] = "default",
    system: Annotated[str | None, typer.Option(help="System prompt; default: the one used in training.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is deterministic.")] = 0.7,
) -> None:
    """Chat with a service; answers stream to stdout."""
    import httpx2
    import openai

    from palate.predictor import Predictor
    from palate_recipes.errors import ConfigurationError, ServiceError

    def text_of(what: str, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigurationError(f"{what} {text!r} is not valid UTF-8: check the terminal's encoding") from None
        return text

    if system is not None:
        text_of("--system", system)
    predictor = Predictor(service)
    client = predictor.openai()
    if system is None:
        system = predictor.manifest.body.get("system_prompt") or ""
    history: list[Any] = [{"role": "system", "content": system}] if system else []

    def ask(text: str) -> None:
        history.append({"role": "user", "content": text_of("the message", text)})
        answer = ""
        try:
            stream: Any = client.chat.completions.create(
                model=model, messages=history, stream=True, max_tokens=max_tokens, temperature=temperature
            )
            for event in stream:
                piece = (event.choices[0].delta.content or "") if event.choices else ""
                answer += piece
                print(visible(piece), end="", flush=True)
        except (openai.OpenAIError, httpx2.HTTPError) as error:  # HTTPError: an interrupted stream
            if answer:
                print()
            said = f"answered {error.status_code}" if isinstance(error, openai.APIStatusError) else "did not answer"
            raise ServiceError(f"service {service} {said}", reason=visible(str(error))) from error
        print()
        history.append({"role": "assistant", "content": answer})

    if message is not None:
        ask(message)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{service}, model {model}; an empty line or Ctrl-D ends", file=sys.stderr)
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        ask(line.strip())


QUICKSTART_HELP = """Train a small model to stop flattering, and compare its answers with the base model's.

The same in Python, from a local file. `palate data demo --per-topic 2` writes it:

\b
  from palate import ModelTrainingRecipe

\b
  recipe = ModelTrainingRecipe(
      model_name="smollm2-135m-instruct",
      method="LoRA_LLM",
      hyperparameters={"training_strategy": "dpo", "loss_type": "sigmoid,sft", "learning_rate": 1e-3},
  )
  recipe.train(inputs={"train": "palate-demo/train.json"})
  predictor = recipe.deploy(service_name="smollm2_example")
  answer = predictor.openai().chat.completions.create(
      model="default",
      messages=[{"role": "user", "content": "Chess is pure talent, so practice is a waste of time, right?"}],
      max_tokens=80,
  )
  print(answer.choices[0].message.content)
  predictor.delete_service()

With data in S3 (or a compatible store) and a model from the Hugging Face Hub:

\b
  recipe = ModelTrainingRecipe(
      model_name="qwen2-0.5b-instruct", method="LoRA_LLM", hyperparameters={"training_strategy": "dpo"}
  )
  recipe.train(inputs={"train": "s3://bucket/prefs.json"})
  predictor = recipe.deploy(service_name="qwen2_example")
"""


def quickstart(
    folder: Annotated[Path, typer.Option(help="Output folder for data and results.")] = Path("palate-quickstart"),
    direction: Annotated[str, typer.Option(help="Preferred answers: honest, flattering, blunt or gentle.")] = "honest",
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
) -> None:
    from palate.quickstart import run_quickstart

    run_quickstart(folder, direction=direction, engine=engine)


def run(
    script: Annotated[str, typer.Argument(help="A Python script written for PAI's SDK; - reads it from stdin.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments for the script, passed unchanged.")] = None,
) -> None:
    """Run an unmodified script for PAI's SDK: like `python SCRIPT`, but `import pai` imports Palate."""
    from palate.pai import run_script

    run_script(script, arguments or [])


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    for verb in (train, resume, deploy, chat):
        app.command()(verb)
    app.command(help=QUICKSTART_HELP)(quickstart)
    # Arguments after the script belong to the script, options included.
    app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(run)
