# Sizes for deploy/quickstart, which sources this; nothing here writes or starts anything.

# plain_number TEXT: 32k, 1m, 4096 as a plain number; exits with 2 on anything else
plain_number() {
    local text=${1,,} factor=1
    case "$text" in
    *k) factor=1024 text=${text%k} ;;
    *m) factor=1048576 text=${text%m} ;;
    esac
    if ! [[ "$text" =~ ^[1-9][0-9]{0,8}$ ]]; then
        printf '%s\n' "quickstart: '$1' is not a number of tokens" >&2
        exit 2
    fi
    echo $((text * factor))
}

# size_bytes TEXT: 128MiB, 2GiB, 4096 as bytes, which is how cachesvc reads sizes; exits with 2 on
# anything else
size_bytes() {
    if ! [[ "$1" =~ ^([0-9]{1,12})(KiB|MiB|GiB|TiB)?$ ]]; then
        printf '%s\n' "quickstart: '$1' is not a size such as 128MiB; KiB, MiB, GiB, TiB" >&2
        exit 2
    fi
    local number=$((10#${BASH_REMATCH[1]})) shift=0
    case "${BASH_REMATCH[2]}" in
    KiB) shift=10 ;;
    MiB) shift=20 ;;
    GiB) shift=30 ;;
    TiB) shift=40 ;;
    esac
    if [ "$number" -gt $(((64 << 40) >> shift)) ]; then
        printf '%s\n' "quickstart: '$1' is above 64TiB" >&2
        exit 2
    fi
    echo $((number << shift))
}

# absolute PATH FOLDER: PATH as seen from FOLDER
absolute() {
    case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$2/$1" ;;
    esac
}

# people BYTES: with a unit, for people
people() {
    local n=$1 unit=MiB
    n=$((n >> 20))
    [ "$n" -lt 10240 ] || { n=$((n >> 10)); unit=GiB; }
    echo "$n $unit"
}

# disk_bytes TOKENS MODE: what their values take at most. SmolLM2-135M has 30 layers of 768 B and up
# to 204 B of index a token; needles 2 of 4,096 and 128 B; the GCA decoder 1,024 B and a landmark of
# 512 B for 64 tokens in pages of its own; LMDB's pages add a twentieth.
disk_bytes() {
    case "$2" in
    synthetic) echo $(($1 * 9 * 1024)) ;;
    gca) echo $(($1 * 1536)) ;;
    *) echo $(($1 * 30 * 1024)) ;;
    esac
}

# lmdb_bytes NEED: the cap of the lmdb tier: twice the need, for another selector's values beside
# them, and never under 8 GiB, so that runs of other lengths stay
lmdb_bytes() {
    local floor=$((8 << 30)) twice=$((2 * $1))
    echo $((twice > floor ? twice : floor))
}

# free_bytes FOLDER, used_bytes FOLDER: of the disk under it, and by the files in it, if it is there
free_bytes() { df --output=avail -B1 "$1" | tail -n 1 | tr -d ' '; }
used_bytes() { if [ -d "$1" ]; then du -s -B1 "$1" | cut -f1; else echo 0; fi; }
