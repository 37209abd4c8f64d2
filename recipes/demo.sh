#!/usr/bin/env bash
# make demo: a tokenizer and a language model, learned from the Python standard library by two processes.
set -euo pipefail
run=${RUN_DIR:-runs/demo}
ptft train clm run_dir="$run" --launch cpu --processes 2
echo
echo "A sample (ptft generate $run --prompt ...):"
ptft generate "$run" --prompt "def __init__(self" --max-new-tokens 48
echo
python - "$run" <<'PY'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
print(f"validation loss   {losses[0]:.3f} -> {losses[-1]:.3f}  ({1 - losses[-1] / losses[0]:.0%} lower)")
print(f"model             {run / 'model'}  (AutoModelForCausalLM.from_pretrained)")
print(f"metrics           {run / 'metrics.jsonl'}")
print(f"TensorBoard       ptft tensorboard {run}")
PY
