#!/bin/sh
# Give each part of a joined site's folder to the user that may read it: site-permissions.sh DIR.
# As root, once after `site join`; run twice, it changes nothing. The numbers are those of the images
# and of systemd/veilgraft.sysusers.conf.
set -eu
dir=$1
vault=64100 courier=64200

give() { # OWNER:GROUP MODE PATH...; what is not there is left out, and no link is followed
    who=$1 mode=$2
    shift 2
    for path in "$@"; do
        if [ -e "$path" ] && [ ! -L "$path" ]; then
            chown "$who" "$path"
            chmod "$mode" "$path"
        fi
    done
}

[ -f "$dir/site.yaml" ] || { echo "$dir: expected a folder that site join made" >&2; exit 2; }

# All is the vault's, the courier's files too: pushed code can't change what Flower starts next.
chown -hR $vault:$vault "$dir"
give $vault:$vault 0711 "$dir"
give $vault:$vault 0600 "$dir/site.yaml" "$dir/coordinator.json"
give $vault:$vault 0700 "$dir/state" "$dir/logs"
give $vault:$courier 0750 "$dir/courier"
for file in "$dir"/courier/*; do
    [ -d "$file" ] || give $vault:$courier 0640 "$file"
done
chown -hR $courier:$courier "$dir/courier/work"
give $courier:$courier 0700 "$dir/courier/work"
# Set-group-id: the vault, who is not of the courier's group, makes its socket there.
give $vault:$courier 2750 "$dir/run"
