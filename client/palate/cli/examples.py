"""The examples in each command's `--help`. A test parses every line, so that none names an option that does not exist."""

from __future__ import annotations

import typer

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "palate train prefs.jsonl --model qwen2-0.5b-instruct",
        "palate train s3://bucket/prefs.json --model qwen2-0.5b-instruct --validation held-out.json -s num_train_epochs=3",
        "palate train answers.jsonl --model smollm2-135m-instruct --strategy sft --name first",
        "palate train --recipe recipe.toml",
        "palate train prefs.jsonl --model qwen2-0.5b-instruct --dry-run",
        "palate train prefs.jsonl --recipe recipe.toml --no-wait",
    ),
    "run-experiment": (
        "palate run-experiment experiments.yml learning-rate --dry-run",
        "palate run-experiment experiments.yml learning-rate --jobs 2",
    ),
    "compare": ("palate compare JOB JOB", "palate compare JOB JOB --metric win_rate --json"),
    "runs compare": ("palate runs compare JOB JOB --csv",),
    "resume": ("palate resume JOB", "palate resume JOB --no-wait"),
    "deploy": (
        "palate deploy JOB",
        "palate deploy JOB --checkpoint latest",
        "palate deploy JOB --require-win-rate 0.55",
        "palate deploy JOB --name assistant --port 8000 --idle-time-to-live 3600",
        "palate deploy smollm2-135m-instruct --base --engine transformers",
    ),
    "chat": (
        "palate chat SERVICE",
        'palate chat SERVICE "Is the earth flat?"',
        'palate chat SERVICE "Is the earth flat?" --model base --temperature 0',
        "palate chat SERVICE --web --votes votes.jsonl",
    ),
    "eval": (
        "palate eval JOB --prompts prompts.jsonl --judge http://127.0.0.1:8000/v1/judge --dry-run",
        "palate eval JOB --prompts prompts.jsonl --judge https://api.openai.com/v1/gpt-4o-mini --judge-api-key-env OPENAI_API_KEY",
        "palate eval JOB OTHER_JOB --prompts prompts.jsonl --judge-service SERVICE --rubric rubric.txt",
        "palate eval JOB",
    ),
    "quickstart": ("palate quickstart", "palate quickstart --direction blunt --folder try"),
    "run": ("palate run pai_script.py", "palate run pai_script.py --epochs 3"),
    "jobs": ("palate jobs", "palate jobs --status Failed --since 7d", "palate jobs --model 'qwen2-*' --json"),
    "services": ("palate services", "palate services --status Running --json"),
    "show": ("palate show JOB", "palate show SERVICE --json", "palate show SERVICE --token"),
    "watch": ("palate watch JOB", "palate watch JOB --timeout 60"),
    "metrics": ("palate metrics JOB", "palate metrics JOB --json"),
    "report": (
        "palate report JOB -o report.html",
        "palate report JOB OTHER_JOB -o comparison.html",
        "palate report JOB --answers palate-quickstart/answers.json",
    ),
    "checkpoints": ("palate checkpoints JOB", "palate checkpoints JOB --json"),
    "top": ("palate top SERVICE", "palate top SERVICE --once --json"),
    "logs": ("palate logs JOB", "palate logs -f SERVICE"),
    "save": (
        "palate save JOB models/first",
        "palate save JOB s3://bucket/models/first",
        "palate save JOB hf://OWNER/NAME",
    ),
    "stop": ("palate stop JOB", "palate stop SERVICE"),
    "start": ("palate start SERVICE",),
    "renew": ("palate renew SERVICE 2h", "palate renew SERVICE never"),
    "update": (
        "palate update SERVICE JOB",
        "palate update SERVICE JOB --checkpoint latest",
        "palate update SERVICE JOB --traffic 0.1",
        "palate update SERVICE JOB --stop-start",
    ),
    "versions": ("palate versions SERVICE", "palate versions SERVICE --json"),
    "traffic": ("palate traffic SERVICE v2=0.1", "palate traffic SERVICE v1=0.5 v2=0.5"),
    "promote": ("palate promote SERVICE",),
    "rollback": ("palate rollback SERVICE",),
    "scale": ("palate scale SERVICE 2",),
    "delete": ("palate delete JOB", "palate delete --yes JOB SERVICE"),
    "clean": ("palate clean", "palate clean --yes"),
    "token list": ("palate token list SERVICE", "palate token list SERVICE --json"),
    "token add": (
        "palate token add SERVICE alice",
        "palate token add SERVICE batch-job --rate-per-minute 600 --concurrency 8",
    ),
    "token remove": ("palate token remove SERVICE alice",),
    "token rotate": ("palate token rotate SERVICE", "palate token rotate SERVICE alice"),
    "adapter list": ("palate adapter list SERVICE", "palate adapter list SERVICE --json"),
    "adapter add": (
        "palate adapter add SERVICE support JOB",
        "palate adapter add SERVICE support s3://bucket/models/support --replace",
    ),
    "adapter rm": ("palate adapter rm SERVICE support",),
    "models": ("palate models", "palate models qwen --wide", "palate models --hyperparameters"),
    "doctor": ("palate doctor", "palate doctor --json"),
    "data check": (
        "palate data check prefs.jsonl",
        "palate data check table.csv --input-column prompt=question --label-column chosen=better --label-column rejected=worse",
        "palate data check prefs.jsonl --fix fixed.jsonl",
    ),
    "data convert": ("palate data convert prefs.csv --to trl --output prefs.jsonl",),
    "data split": ("palate data split prefs.jsonl --output train.jsonl",),
    "data stats": ("palate data stats prefs.jsonl", "palate data stats prefs.jsonl --json"),
    "data formats": ("palate data formats",),
    "data demo": ("palate data demo", "palate data demo my-demo --direction gentle --per-topic 2"),
    "data generate": (
        "palate data generate prompts.txt -o pairs.jsonl --service SERVICE --judge-model gpt-4o-mini --dry-run",
        "palate data generate prompts.txt -o pairs.jsonl --base-url http://127.0.0.1:8000/v1 --model a --model b",
    ),
    "store up": ("palate store up", "palate store up --folder s3-data --port 9000"),
    "images build": ("palate images build", "palate images build trainer --variant cuda"),
    "images list": ("palate images list",),
}
"""Command lines by command."""


def add_examples(app: typer.Typer, group: str = "") -> None:
    """Adds the examples to the help of every command of `app`."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = group + (command.name or command.callback.__name__)
        # \b keeps click from joining the lines into a paragraph.
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name])
    for member in app.registered_groups:
        assert member.typer_instance is not None
        add_examples(member.typer_instance, f"{member.name} ")
