#!/usr/bin/env bash
# A run on a machine that may be taken away: start this at every boot, or type it again; it goes on where it was.
#   MODEL=d12 DATA="data/fineweb10B/fineweb_train_*.bin" ITERATIONS=4768 docs/recipes/spot.sh [flags of train_gpt2_mod.py]
# Exit codes: 0 finished; 2 a mistake in the flags; 143 stopped by a signal; 1 after 50 attempts that failed.
set -uo pipefail
for name in MODEL DATA ITERATIONS; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; see the top of $0" >&2 && exit 2; }
done
: "${PROCESSES:=1}" # GPUs of this machine
: "${TRAIN:=train_gpt2_mod.py}"
: "${PAUSE:=5}"

stopped="" child=""
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM INT
for _ in $(seq 50); do
  python -m unbroken launch --nproc_per_node="$PROCESSES" "$TRAIN" --resume_from auto \
    --model "$MODEL" --input_bin "$DATA" --num_iterations "$ITERATIONS" "$@" &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child" # the signal came in between
  until wait "$child"; code=$?; ! kill -0 "$child" 2>/dev/null; do :; done
  child=""
  if [ "$code" = 0 ] || [ "$code" = 2 ]; then exit "$code"; fi
  if [ -n "$stopped" ]; then exit 143; fi
  sleep "$PAUSE"
done
exit 1
