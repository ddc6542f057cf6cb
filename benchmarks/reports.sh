#!/usr/bin/env bash
# The reports under docs/results: real annotators through the whole protocol, on all-MiniLM-L6-v2 and a CPU.
#
#   benchmarks/reports.sh RAW MODEL [tweeteval|others]
#
# RAW holds the raw files, a folder per dataset; MODEL is all-MiniLM-L6-v2 as a Hugging Face folder. Tasks are prepared and
# trained under runs/reports: a run that was killed goes on where it was, and what is finished is not done again. tweeteval
# has all layers, three seeds and learning rates of its own; the others take its rates, and adapters in the top two layers.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..") raw=$(realpath "$1") model=$(realpath "$2")
python=$root/.venv/bin/python
declare -A tasks=(
    [tweeteval]=tasks/tweeteval
    [others]=$(echo tasks/{hatexplain,epic,cockamamie,subjectivediscourse_{response,question_sentiment,response_sentiment},studemo})
)
declare -A options=(
    [tweeteval]="--methods lora,houlsby,ia3,prefix,head --seeds 3 --epochs 3 --cold-start"
    [others]="--methods lora,head --epochs 3 --top-layers 2 --lrs-from tweeteval"
)
mkdir -p "$root/runs/reports/tasks"
cd "$root/runs/reports"
ln -sfn "$model" all-MiniLM-L6-v2  # so that the commands that reports quote are those of any machine

for run in ${3:-tweeteval others}; do
    for task in ${tasks[$run]}; do
        dataset=${task#tasks/} dataset=${dataset%%_*} drawn=
        [ "$dataset" != cockamamie ] || drawn="--users 100 --seed 42"
        [ -e "$task" ] || "$python" "$root/data_scripts/prepare_$dataset.py" --raw "$raw" --out tasks $drawn
    done
    "$python" -m minipeft.bench peftu --tasks ${tasks[$run]} --model all-MiniLM-L6-v2 ${options[$run]} --out "$run"
    mkdir -p "$root/docs/results/$run"
    rm -rf "$root/docs/results/$run/figures"
    cp -r "$run"/{report.html,report.md,figures,result.json} "$root/docs/results/$run/"
done
