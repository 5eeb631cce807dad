//! Guests that a seed sets up when they first start.

use crate::debian::{LOGIN, Started, running};
use crate::networks::output;
use anyhow::{Context, Result, anyhow, ensure};
use std::fs;
use std::path::Path;
use std::time::Duration;
use tempfile::NamedTempFile;
use xtask::debian::{Extra, Recipe};
use xtask::guest_file::Described;
use xtask::seed::{Seed, Wishes};
use xtask::ssh::Client;

/// How long a command may take.
const COMMAND: Duration = Duration::from_mins(5);
/// The key `timezone` is one that only cloud-init knows.
const USER_DATA: &str = r#"#cloud-config
users:
  - default
  - name: ann
    gecos: Ann O'Neill
    groups: [users]
    sudo: ALL=(ALL) NOPASSWD:ALL
    shell: /bin/sh
    lock_passwd: false
    plain_text_passwd: two words
timezone: Europe/Paris
write_files:
  - {path: /etc/seeded/text, content: "it's $HOME\n", permissions: '0640', owner: 'root:adm'}
  - {path: /etc/seeded/text, content: bW9yZQo=, encoding: b64, append: true, permissions: '0640', owner: 'root:adm'}
runcmd:
  - echo "$(hostname) $(id -un)" >> /root/late
  - [touch, "/root/a  b"]
"#;
/// Kernels name the device of a vif `eth0` or `enX0`; its address is the same.
const NETWORK: &str = "version: 2\nethernets:\n  any:\n    match: {macaddress: '00:16:3e:00:00:50'}\n    addresses: [10.77.0.50/24]\n    \
                       routes: [{to: '0.0.0.0/0', via: 10.77.0.1}]\n    nameservers: {addresses: [10.77.0.1]}\n";

/// The name that the guest gives itself.
pub(crate) const NAME: &str = "web";

/// Gives a guest with Debian a name, users, keys, files, commands and a network by a seed. Returns the file of the volume.
pub(crate) fn give(guest: &mut Described, folder: &Path, client: &Client) -> Result<NamedTempFile> {
    let [user_data, network] = [("user-data", USER_DATA), ("network", NETWORK)].map(|(name, text)| {
        let file = folder.join(name);
        fs::write(&file, text).map(|()| file)
    });
    let wishes = Wishes::new(Some(format!("{NAME}.example.org")), vec![client.key.with_extension("pub")]);
    let wishes = wishes.with_user_data(user_data?).with_network_config(network?);
    // dom0 leads connections to the address that it knows of.
    guest.config.vif = vec!["ip=10.77.0.50,mac=00:16:3e:00:00:50".parse().map_err(|why| anyhow!("{why}"))?];
    Seed::read(&wishes)?.context("a seed is wished for")?.attach(guest)
}

/// Checks that a guest, which root enters at this port, is set up as its seed says, and was so once.
pub(crate) fn check(client: &Client, port: u16) -> Result<()> {
    for (script, expected) in [
        ("hostname", "web\n"),
        ("getent passwd ann | cut -d: -f5,7; id -nG ann", "Ann O'Neill:/bin/sh\nann users\n"),
        // What `crypt` makes of the password is what is stored.
        ("perl -e 'print crypt(\"two words\", $ARGV[0]) eq $ARGV[0]' $(getent shadow ann | cut -d: -f2)", "1"),
        ("sudo -u ann sudo -n id -un", "root\n"),
        ("cat /etc/seeded/text; stat -c '%a %U %G' /etc/seeded/text", "it's $HOME\nmore\n640 root adm\n"),
        ("ip -4 -o addr show scope global | awk '{print $4}'", "10.77.0.50/24\n"),
        // It has not been told so by DHCP.
        ("ip route show default | sed 's/dev [^ ]* //; s/ *$//'", "default via 10.77.0.1 proto static\n"),
        ("cat /root/late; test -f '/root/a  b' && echo there", "web root\nthere\n"),
    ] {
        let said = output(&mut client.command(port, script), COMMAND)?;
        ensure!(said == expected, "{script}: {said:?}, and not {expected:?}");
    }
    let said = output(&mut client.command_as("debian", port, "sudo -n id -un"), COMMAND)?;
    ensure!(said == "root\n", "the default user is {said:?}");
    Ok(())
}

/// A guest with Debian and cloud-init has the name, users, keys, files and network of its seed, and has carried out its
/// commands: once, although it starts twice.
pub(crate) fn cloud_init_reads_a_seed(title: &str) -> Result<()> {
    let started = Started::new(title, &Recipe { with: vec![Extra::CloudInit], ..Recipe::default() })?;
    // What is not named here stays until the guest has ended.
    let Started { mut machine, client, port, .. } = started;
    machine.expect(&format!("{NAME} login: "), LOGIN)?;
    let root = |script: &str| output(&mut client.command(port, script), COMMAND);
    let first = running(&root)?;
    check(&client, port)?;
    // The end of the connection is no success.
    let _ = root("reboot");
    machine.expect(&format!("{NAME} login: "), 2 * LOGIN)?;
    ensure!(running(&root)? != first, "the guest has not rebooted");
    check(&client, port)?;
    let _ = root("poweroff");
    machine.finish()?.require_success()
}
