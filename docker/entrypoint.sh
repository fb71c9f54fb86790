#!/usr/bin/env bash
# Runs a command as the user of the host, so that the files it writes on the mounted project belong to that user.
#
#     entrypoint.sh COMMAND [ARGUMENT ...]
#
# HOST_UID and HOST_GID name the user; without them, the command runs as root. requirements.lock is installed if it is
# newer than the installed one and differs from it.
set -euo pipefail

project=${PROJECT_DIR:-/workspace}
environment=${ENVIRONMENT_DIR:-/opt/hf_ilora/environment}
home=${HOME_DIR:-/home/hf_ilora}
python=${PYTHON:-python3.11}
uid=${HOST_UID:-0}
gid=${HOST_GID:-$uid}

fail() {
    echo "entrypoint.sh: $*" >&2
    exit 2
}

[[ $uid =~ ^[0-9]+$ && $gid =~ ^[0-9]+$ ]] \
    || fail "HOST_UID is '$uid' and HOST_GID is '$gid': expected numbers; pass the output of id -u and of id -g"
[[ -f $project/requirements.lock ]] \
    || fail "$project/requirements.lock is not there: expected the project; mount it with --volume FOLDER:$project"

# Make a user and a group with these ids, unless the image has them.
as_user=()
if ((uid != 0)); then
    getent group "$gid" > /dev/null || groupadd --gid "$gid" hf_ilora
    getent passwd "$uid" > /dev/null \
        || useradd --uid "$uid" --gid "$gid" --no-create-home --home-dir "$home" --shell /bin/bash hf_ilora
    as_user=(setpriv --reuid "$uid" --regid "$gid" --init-groups)
    USER=$(getent passwd "$uid" | cut --delimiter : --fields 1)
    HOME=$home
    export HOME USER LOGNAME=$USER
fi

# The folders may be volumes that belong to root at first, or to another user of the host.
for folder in "$home" "$environment"; do
    mkdir --parents "$folder"
    [[ $(stat --format %u:%g "$folder") == "$uid:$gid" ]] || chown --recursive "$uid:$gid" "$folder"
done

is_outdated() {
    [[ ! -f $environment/installed ]] && return 0
    [[ $project/requirements.lock -nt $environment/installed ]] \
        && ! cmp --silent "$project/requirements.lock" "$environment/installed"
}

# One container installs; others with the same volume wait for it. The lock file is copied last, as the mark of success.
exec {lock}> "$environment.lock"
flock "$lock"
if is_outdated; then
    echo "entrypoint.sh: installing requirements.lock into $environment" >&2
    rm -f "$environment/installed"
    "${as_user[@]}" "$python" -m venv --clear "$environment"
    "${as_user[@]}" "$environment/bin/python" -m pip install --quiet --requirement "$project/requirements.lock" >&2
    "${as_user[@]}" "$environment/bin/python" -m pip install --quiet --no-deps --no-build-isolation \
        --editable "$project" >&2
    "${as_user[@]}" cp "$project/requirements.lock" "$environment/installed"
fi
exec {lock}>&-

cd "$project"
export PATH=$environment/bin:$PATH
(($# > 0)) || set -- bash
# exec: the command gets the signals of the container, and its exit code is the container's.
exec "${as_user[@]}" "$@"
