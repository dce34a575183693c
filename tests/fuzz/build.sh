#!/bin/sh
# Build the fuzz harnesses with gcc and the sanitizers: build.sh [DIRECTORY]
#
# With clang and libFuzzer instead of the driver here:
#   CC=clang ENGINE=-fsanitize=fuzzer DRIVER= sh tests/fuzz/build.sh
set -eu

here=$(cd "$(dirname "$0")" && pwd)
source=$here/../../csrc
to=${1:-$here/build}

mkdir -p "$to"
for name in decode text admit diff; do
    # shellcheck disable=SC2086
    ${CC:-gcc} -std=c11 -D_GNU_SOURCE -g -O1 -Wall -Wextra -Werror \
        -fsanitize=address,undefined -fno-sanitize-recover=all ${ENGINE:-} \
        -I"$source" -I"$here" -o "$to/fuzz_$name" "$here/fuzz_$name.c" ${DRIVER-"$here/driver.c"} \
        "$source/table.c" "$source/rtnl.c" "$source/claim.c"
done
