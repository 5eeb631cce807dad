//! NoCloud seeds: a small volume labelled CIDATA from which a guest learns its name, users, keys and network when it first
//! starts.
//!
//! cloud-init reads the files `user-data`, `meta-data` and `network-config`. A guest of `cargo xtask image debian` without
//! cloud-init carries out the scripts `tenon-early` and `tenon-late` of the same volume, which are made of these files here, on
//! the host: so what cannot be read is refused with its line before a machine starts, and what only cloud-init knows is named.

mod keys;
mod network;
mod script;
mod user_data;
mod yaml;

use crate::disk;
use crate::guest_file::Described;
use crate::iso9660;
use anyhow::{Context, Result, anyhow, ensure};
use network::Network;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;
use user_data::UserData;
use yaml::Wrong;

/// The program that carries out a seed in a guest without cloud-init.
pub(crate) const PROGRAM: &str = include_str!("seed/unit.sh");
/// The unit that starts it before the guest has a network and lets anybody in, and the unit for the rest.
pub(crate) const UNITS: [(&str, &str); 2] = [
    (
        "etc/systemd/system/tenon-seed.service",
        // As early as cloud-init's first unit: the next one waits for the network before it lets `sysinit.target` be reached.
        "[Unit]\nDescription=Set up the guest as its seed says\nConditionPathExists=!/usr/bin/cloud-init\n\
         DefaultDependencies=no\nConflicts=shutdown.target\nAfter=local-fs.target systemd-sysusers.service\n\
         Wants=network-pre.target\nBefore=shutdown.target network-pre.target ssh.service systemd-user-sessions.service\n\n\
         [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/lib/tenon/seed\nStandardOutput=journal+console\n\
         StandardError=journal+console\n\n[Install]\nWantedBy=multi-user.target\n",
    ),
    (
        "etc/systemd/system/tenon-seed-late.service",
        "[Unit]\nDescription=Carry out the packages and commands of the seed\nWants=network-online.target\n\
         After=network-online.target\n\n\
         [Service]\nType=oneshot\nExecStart=/usr/lib/tenon/seed late\nTimeoutStartSec=infinity\n\
         StandardOutput=journal+console\nStandardError=journal+console\n",
    ),
];

/// The label by which guests know the volume.
const LABEL: &str = "CIDATA";
/// The maximum number of bytes of a file of the user's.
const LARGEST: u64 = 1 << 20;
/// User-data that asks for nothing.
const NOTHING: &str = "#cloud-config\n{}\n";

/// What a guest is told when it first starts.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Wishes {
    /// Set up the guest of `--guest` as this file says when it first starts: user-data of cloud-init, a `#cloud-config`
    #[arg(long, value_name = "FILE", requires = "system", conflicts_with = "oci")]
    user_data: Option<PathBuf>,
    /// Let the key in this file enter the guest as its default user (`debian`): a public key of ssh. Can be repeated
    #[arg(long, value_name = "FILE", requires = "system", conflicts_with = "oci")]
    ssh_key: Vec<PathBuf>,
    /// The name that the guest gives itself when it first starts
    #[arg(long, value_name = "NAME", requires = "system", conflicts_with = "oci", value_parser = host_name)]
    hostname: Option<String>,
    /// Set up the guest's network devices as this file says, version 2 of cloud-init's network configuration
    #[arg(long, value_name = "FILE", requires = "system", conflicts_with = "oci")]
    network_config: Option<PathBuf>,
}

impl Wishes {
    /// Wishes that give a guest a name, and let the keys in files enter it.
    #[must_use]
    pub fn new(hostname: Option<String>, ssh_key: Vec<PathBuf>) -> Self {
        Self { hostname, ssh_key, ..Self::default() }
    }

    /// The same with user-data.
    #[must_use]
    pub fn with_user_data(self, file: PathBuf) -> Self {
        Self { user_data: Some(file), ..self }
    }

    /// The same with a network configuration.
    #[must_use]
    pub fn with_network_config(self, file: PathBuf) -> Self {
        Self { network_config: Some(file), ..self }
    }
}

fn host_name(text: &str) -> Result<String, String> {
    check_host_name(text).map(|()| text.to_owned())
}

/// Checks a host's name, with or without a domain (RFC 1123, and Linux's limit).
fn check_host_name(name: &str) -> Result<(), String> {
    let label = |label: &str| {
        let plain = label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        (1..=63).contains(&label.len()) && plain && !label.starts_with('-') && !label.ends_with('-')
    };
    match name.len() <= 64 && name.split('.').all(label) {
        true => Ok(()),
        false => Err(format!("{name:?} is no name of a host: letters, digits, and hyphens between them, 64 at most")),
    }
}

/// What stands on a seed.
#[derive(Clone, Debug)]
pub struct Seed {
    files: Vec<(&'static str, String)>,
    /// What only cloud-init knows, with file and line: other guests leave it out.
    pub unknown: Vec<String>,
}

impl Seed {
    /// Reads what `wishes` name; `None` if they name nothing.
    ///
    /// # Errors
    /// What is wrong first, with its file and line.
    pub fn read(wishes: &Wishes) -> Result<Option<Self>> {
        let Wishes { user_data, ssh_key, hostname, network_config } = wishes;
        if user_data.is_none() && ssh_key.is_empty() && hostname.is_none() && network_config.is_none() {
            return Ok(None);
        }
        let keys = ssh_key.iter().map(|file| keys::read(file)).collect::<Result<Vec<_>>>().context("--ssh-key")?;
        let keys = keys.concat();
        let text = match user_data {
            Some(file) => text(file).context("--user-data")?,
            None => NOTHING.to_owned(),
        };
        let at = |option: &str, file: &Option<PathBuf>, wrong: &Wrong| {
            let file = file.as_deref().unwrap_or(Path::new("")).display();
            anyhow!("{option}: {file}:{wrong}")
        };
        let data = UserData::read(&text, &keys).map_err(|wrong| at("--user-data", user_data, &wrong))?;
        if let (Some(option), Some(name)) = (hostname, data.fqdn.as_ref().or(data.hostname.as_ref())) {
            let wrong = Wrong::new(data.host_line, format!("names the host {name}, and --hostname {option}"));
            ensure!(name == option, at("--user-data", user_data, &wrong));
        }
        let config = network_config.as_deref().map(|file| self::text(file).context("--network-config")).transpose()?;
        let network = config.as_deref().map(Network::read).transpose();
        let network = network.map_err(|wrong| at("--network-config", network_config, &wrong))?.unwrap_or_default();
        let note = |file: &'static str| move |(line, key): &(usize, String)| format!("{file}:{line}: {key}");
        let unknown = data.unknown.iter().map(note("user-data"));
        let unknown: Vec<String> = unknown.chain(network.unknown.iter().map(note("network-config"))).collect();
        let mut files = vec![("user-data", text)];
        files.extend(config.map(|config| ("network-config", config)));
        files.push(("tenon-early", script::early(&data, &network, host(&data, hostname.as_deref()), &unknown)));
        files.extend(script::late(&data).map(|script| ("tenon-late", script)));
        // The scripts follow from the rest.
        let content = [&text_of(&files, "user-data"), &text_of(&files, "network-config"), &keys.join("\n")];
        let id = content.into_iter().chain([&hostname.clone().unwrap_or_default()]).fold(String::new(), |all, text| {
            // Where one text ends and the next begins counts, too.
            format!("{all}{}\n{text}", text.len())
        });
        files.push(("meta-data", meta_data(disk::hash(id.as_bytes()), hostname.as_deref(), &keys)));
        Ok(Some(Self { files, unknown }))
    }

    /// Gives a guest the volume: one more disk, which the guest only reads, by the first name that is free. It is a file of the
    /// boot bundle, which disappears with the returned value.
    ///
    /// # Errors
    /// No room for the file, or the guest has as many disks as there are names.
    pub fn attach(&self, guest: &mut Described) -> Result<NamedTempFile> {
        let taken = |name: &str| guest.config.disk.iter().any(|disk| disk.vdev.name() == name);
        let name = ('b'..='z').map(|letter| format!("xvd{letter}")).find(|name| !taken(name));
        let name = name.with_context(|| format!("{} has no room for one more disk", guest.config.name))?;
        let files: Vec<(&str, &[u8])> = self.files.iter().map(|(name, text)| (*name, text.as_bytes())).collect();
        let mut file = tempfile::Builder::new().prefix("tenon-seed-").suffix(".iso").tempfile()?;
        file.write_all(&iso9660::volume(LABEL, &files)?).context("cannot write the seed")?;
        let entry = format!("disks/{}", disk::serial(file.path()));
        guest.config.disk.push(format!("bundle:{entry},,{name},r").parse().map_err(|why| anyhow!("{why}"))?);
        guest.images.push((entry, file.path().to_owned()));
        Ok(file)
    }
}

fn text_of(files: &[(&str, String)], wanted: &str) -> String {
    files.iter().find(|(name, _)| *name == wanted).map(|(_, text)| text.clone()).unwrap_or_default()
}

/// Reads a text of the user's.
fn text(file: &Path) -> Result<String> {
    let name = file.display();
    let metadata = fs::metadata(file).with_context(|| format!("{name}: no such file"))?;
    ensure!(metadata.is_file(), "{name}: is no regular file");
    ensure!(metadata.len() <= LARGEST, "{name}: has more than {LARGEST} bytes");
    let bytes = fs::read(file).with_context(|| format!("{name}: cannot be read"))?;
    String::from_utf8(bytes).map_err(|_| anyhow!("{name}: is no text in UTF-8"))
}

/// The guest's name, and its name with a domain: by user-data, or else by the option.
fn host<'a>(data: &'a UserData, option: Option<&'a str>) -> Option<(&'a str, &'a str)> {
    let full = data.fqdn.as_deref().or(data.hostname.as_deref()).or(option)?;
    let short = data.hostname.as_deref().unwrap_or(full);
    Some((short.split('.').next().unwrap_or(short), full))
}

/// cloud-init takes the default user's keys from here, whatever the user-data says.
fn meta_data(id: u64, hostname: Option<&str>, keys: &[String]) -> String {
    let mut text = format!("instance-id: iid-tenon-{id:016x}\n");
    if let Some(name) = hostname {
        let _ = writeln!(text, "local-hostname: \"{name}\"");
    }
    if !keys.is_empty() {
        text.push_str("public-keys:\n");
    }
    for key in keys {
        let _ = writeln!(text, "  - \"{}\"", key.replace('\\', "\\\\").replace('"', "\\\""));
    }
    text
}

#[cfg(test)]
mod tests;
