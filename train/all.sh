#!/usr/bin/env bash
# Train CLIP, prior, layout network and layout prior (if there are configs), decoder and upsampler in
# order, and assemble them:
#
#     train/all.sh CONFIGS [--set KEY=VALUE ...]
#
# CONFIGS is a folder such as configs/emoji/gpu. All other arguments go to each training script. A network whose run is
# complete is skipped, and an interrupted one continues, so that the command can be repeated; it stops at a network whose run
# is interrupted. The variable LAUNCH replaces `accelerate launch`, for example LAUNCH="torchrun --nproc_per_node 8".
set -euo pipefail

configs=${1:?usage: train/all.sh CONFIGS [--set KEY=VALUE ...]}
shift

output_of() { sed -n 's/^ *output: *//p' "$configs/$1.yaml"; }

# complete RUN: whether it has a model, and its newest checkpoint is of the last step, with no validation or preview left to
# do, or all checkpoints were deleted
complete() {
  [ -d "$1/model" ] && python -c '
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
newest = max(run.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")), default=None)
if newest:
    state = json.loads((newest / "state.json").read_text())
    steps = json.loads((run / "config.json").read_text())["fit"]["steps"]
    sys.exit(state["step"] < steps or bool(state.get("pending")))' "$1"
}

# train NAME [ARGUMENT ...]
train() {
  local name=$1 run resume=()
  run=$(output_of "$name")
  shift
  complete "$run" && return
  compgen -G "$run/checkpoints/step-*" > /dev/null && resume=(--resume latest)
  ${LAUNCH:-accelerate launch} "train/$name.py" --config "$configs/$name.yaml" ${resume[@]+"${resume[@]}"} "$@"
  complete "$run" && return
  echo "$run is not complete; run the same command again to continue" >&2
  exit 1
}

train clip "$@"
train prior "$@"
[ -f "$configs/layout.yaml" ] && train layout "$@"
[ -f "$configs/layout_prior.yaml" ] && train layout_prior "$@"
train decoder "$@"
[ -f "$configs/upsampler.yaml" ] && train upsampler "$@"
python train/bundle.py --config "$configs/model.yaml"
