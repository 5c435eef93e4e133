#!/bin/bash
# Install what tests/slurm starts: Slurm's controller, node daemon and commands, and munge.
# Debian or Ubuntu, as root. Nothing is left running: the tests start daemons of their own, with
# their own settings, keys and ports, in a scratch folder.
set -eu
if [ "$(id -u)" != 0 ]; then echo "error: $0 needs root (sudo $0)" >&2; exit 1; fi
if ! command -v apt-get >/dev/null; then echo "error: $0 needs apt-get" >&2; exit 1; fi
# invoke-rc.d asks this file; 101 says that the packages may not start their services.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge
