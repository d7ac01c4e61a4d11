#!/usr/bin/env bash
# A run on a machine that may be taken away: start this at every boot, or type it again; it goes on where it was.
#   RUN=<uuid4> docs/recipes/spot.sh [flags of train_gpt2_mod.py]
# It ends when the run is finished, when a signal has stopped it, or after 50 attempts that failed.
set -uo pipefail
: "${RUN:=$(cat run_id 2>/dev/null || python3 -c 'import uuid; print(uuid.uuid4())' | tee run_id)}"
: "${PROCESSES:=1}"
: "${TRAIN:=train_gpt2_mod.py}"
: "${PAUSE:=5}"

# A run is finished when its final.pt is there and the last attempt was not stopped: one that is being extended has its
# old final.pt.
finished() {
  [ -e "logs/$RUN/final.pt" ] && ! tail -qn 1 "logs/$RUN/"*.metrics.jsonl 2>/dev/null | grep -q '"why": *"stopped"'
}

stopped="" child=""
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM INT
for _ in $(seq 50); do
  torchrun --standalone --nproc_per_node="$PROCESSES" "$TRAIN" --run_id "$RUN" --resume_from auto "$@" &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child" # the signal came in between
  until wait "$child"; code=$?; ! kill -0 "$child" 2>/dev/null; do :; done
  if [ "$code" = 0 ] && finished; then exit 0; fi
  child=""
  if [ -z "$stopped" ]; then sleep "$PAUSE"; fi
  if [ -n "$stopped" ]; then exit 143; fi
done
exit 1
