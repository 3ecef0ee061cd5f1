#!/usr/bin/env bash
# Everything that needs a GPU, from a bare checkout, in under 8 minutes; results come as they are made, under $OUT.
#
#   OUT=out bash bench/gpu.sh                        # facts, tests, kernels and the main job, in $OUT/run.jsonl
#   SECTIONS="kernels" CASES="hsic,cka" bash bench/gpu.sh
#   SECTIONS="job" JOB="plan verify write refine" bash bench/gpu.sh
#   SCRATCH=/data bash bench/gpu.sh                  # where the random checkpoints are written, instead of /tmp
#   DRY=1 OUT=out bash bench/gpu.sh                  # tiny shapes on the CPU: checks this script
#   python bench/gpu_report.py $OUT/run.jsonl        # writes bench/reports/gpu.md
#
# Nothing of this repository needs to be installed. A section that fails or runs out of its time does not stop the next.
set -u
cd "$(dirname "$0")/.."
export OUT="${OUT:-build/gpu}"
export PYTHONPATH="$PWD:$PWD/kernels/torch-ext:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTHON="${PYTHON:-python3}"
SECTIONS="${SECTIONS:-facts tests kernels job}"
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
RUN="$OUT/run.jsonl"
# The checkpoints (31 GB) go when the script ends, even where the job ran out of its time.
SCRATCH="$(mktemp -d "${SCRATCH:-/tmp}/lorasuite-gpu-XXXXXX")"
export SCRATCH
trap 'rm -rf "$SCRATCH"' EXIT

section() { # name, seconds, command …
  local name="$1" limit="$2" start code
  shift 2
  case " $SECTIONS " in *" $name "*) ;; *) return ;; esac
  start=$(date +%s)
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  echo "{\"kind\": \"section\", \"name\": \"$name\", \"exit\": $code, \"seconds\": $(($(date +%s) - start))}" >>"$RUN"
  echo "$name: exit $code after $(($(date +%s) - start)) s"
  tail -n 4 "$OUT/$name.log"
}

KERNEL_TESTS="tests/test_kernels_cka.py tests/test_kernels_heads.py tests/test_kernels_tables.py"
KERNEL_TESTS="$KERNEL_TESTS tests/test_kernels_dispatch.py"
if [ -n "${DRY:-}" ]; then
  PYTEST="--collect-only"
else
  PYTEST="-n ${WORKERS:-8}"
fi

section facts "${FACTS_S:-60}" "$PYTHON" bench/gpu_facts.py "$RUN"
section tests "${TESTS_S:-120}" "$PYTHON" -m pytest -m gpu -q -p no:benchmark -p no:cacheprovider $PYTEST $KERNEL_TESTS
section kernels "${KERNELS_S:-120}" "$PYTHON" bench/gpu.py "$RUN"
section job "${JOB_S:-180}" "$PYTHON" bench/gpu_job.py "$RUN"
