#!/bin/bash
# One conversion by Slurm alone: bash array.sh MODEL OUTPUT [OPTIONS OF bitwright plan]
#
# Submits five jobs, each of which waits for the one before it. A task that is stopped, as its time is over or its node is
# wanted, is put into the queue again, and goes on where it was; so does one that is submitted again with this script.
# May be set: WORK, PARTS (16 at most), SCRATCH (a disk of each node), SBATCH_OPTIONS (for all jobs), CALIBRATION, and
# STATISTICS: --moments for error feedback, --activations for a directory that smooths.
set -euo pipefail

MODEL=$1 OUTPUT=$2
shift 2
WORK=${WORK:-$OUTPUT.work} PARTS=${PARTS:-16} CALIBRATION=${CALIBRATION:---calibration embedded}
mkdir -p "$WORK/logs"
scratch=${SCRATCH:+--scratch $SCRATCH}
array="--array=1-$PARTS"
given="--imatrix $WORK/importance.gguf"
case "${STATISTICS:-}" in *--activations*) given="";; esac  # which tell the importance, too
given="$given ${STATISTICS:+--statistics $WORK/importance.statistics}"

submit() {  # NAME AFTER "OPTIONS" COMMAND, which is run as it is written
    sbatch --parsable --requeue --open-mode=append --signal=TERM@120 --cpus-per-task=8 --mem=16G ${SBATCH_OPTIONS:-} \
        --job-name="$1" --output="$WORK/logs/%x-%a.log" ${2:+--dependency=afterok:$2} $3 \
        --wrap="srun $4; code=\$?; case \$code in 75|130) scontrol requeue \$SLURM_JOB_ID;; esac; exit \$code"
}

calibrated=$(submit importance "" "$array" "bitwright imatrix $MODEL $CALIBRATION ${STATISTICS:-} --part /$PARTS $scratch \
    --output $WORK/importance/\$SLURM_ARRAY_TASK_ID.safetensors")
merged=$(submit merge "$calibrated" "" "bitwright imatrix --merge $WORK/importance/*.safetensors --fresh \
    --output $WORK/importance.gguf")
planned=$(submit plan "$merged" "" "bitwright plan $MODEL $given --output $OUTPUT \
    --save $WORK/plan.json $*")
encoded=$(submit encode "$planned" "$array" "bitwright encode --plan $WORK/plan.json --part /$PARTS $scratch \
    --output $WORK/encoded/\$SLURM_ARRAY_TASK_ID.json")
submit finish "$encoded" "" "bitwright finish --plan $WORK/plan.json $WORK/encoded/*.json"
