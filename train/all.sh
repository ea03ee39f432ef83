#!/usr/bin/env bash
# Train CLIP, prior, layout network and layout prior (if there are configs), decoder and upsampler in
# order, and assemble them:
#
#     train/all.sh CONFIGS [--set KEY=VALUE ...]
#
# CONFIGS is a folder such as configs/emoji/gpu. All other arguments go to each training script. A network whose run is
# complete is skipped, and an interrupted one continues, so that the command can be repeated. The variable LAUNCH replaces
# `accelerate launch`, for example LAUNCH="torchrun --nproc_per_node 8".
set -euo pipefail

configs=${1:?usage: train/all.sh CONFIGS [--set KEY=VALUE ...]}
shift

output_of() { sed -n 's/^ *output: *//p' "$configs/$1.yaml"; }

# train NAME [ARGUMENT ...]
train() {
  local name=$1 run resume=()
  run=$(output_of "$name")
  shift
  [ -d "$run/model" ] && return
  compgen -G "$run/checkpoints/step-*" > /dev/null && resume=(--resume latest)
  ${LAUNCH:-accelerate launch} "train/$name.py" --config "$configs/$name.yaml" "${resume[@]}" "$@"
}

train clip "$@"
train prior "$@"
[ -f "$configs/layout.yaml" ] && train layout "$@"
[ -f "$configs/layout_prior.yaml" ] && train layout_prior "$@"
train decoder "$@"
[ -f "$configs/upsampler.yaml" ] && train upsampler "$@"
python train/bundle.py --config "$configs/model.yaml"
