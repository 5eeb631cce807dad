//! What makes a busybox guest reachable by ssh: the server dropbear with its libraries, and a key of the host's user.

use crate::apt::{self, Programs};
use crate::cache;
use anyhow::{Context, Result, ensure};
use object::Endianness;
use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{Dyn, FileHeader};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use xshell::Shell;

const SERVER: &str = "usr/sbin/dropbear";
/// Where the libraries of packages are.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
/// The program that starts programs with libraries; each of these names it by this path.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

const DROPBEAR: Programs = Programs {
    kind: "dropbear",
    packages: &["dropbear-bin"],
    why: "to reach guests by ssh",
    complete: |root| root.join(SERVER).is_file(),
};
const CLIENT: Programs = Programs {
    kind: "openssh",
    packages: &["openssh-client"],
    why: "to reach guests by ssh",
    complete: |root| ["ssh", "ssh-keygen"].iter().all(|program| root.join("usr/bin").join(program).is_file()),
};

/// Options of ssh for guests, each of which makes a new key of its own when it starts.
pub const ANY_HOST_KEY: &str = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null";

/// The client: the program `ssh`, and the key with which guests are entered.
#[derive(Clone, Debug)]
pub struct Client {
    /// The folder below which the programs are: `/` if they are installed.
    root: PathBuf,
    /// The file of the private key.
    pub key: PathBuf,
}

impl Client {
    /// Finds the programs, installed or in the cache, and the key; fetches the programs and makes the key if need be.
    ///
    /// # Errors
    /// The programs cannot be fetched, or do not work.
    pub fn find(sh: &Shell) -> Result<Self> {
        let root = CLIENT.find(sh)?;
        let key = key()?;
        if !key.is_file() {
            let _lock = cache::lock("ssh")?;
            if !key.is_file() {
                make_key(&root, &key)?;
            }
        }
        Ok(Self { root, key })
    }

    /// Returns, for `doctor`, whether the programs of both sides are there, and a text that tells where they are or would come
    /// from.
    ///
    /// # Errors
    /// No cache folder can be named.
    pub fn state() -> Result<(bool, String)> {
        Ok(match (CLIENT.present()?, DROPBEAR.present()?) {
            (Some(client), Some(server)) => {
                (true, format!("ssh below {}, dropbear below {}", client.display(), server.display()))
            }
            (client, server) => {
                let missing = [(client, "openssh-client"), (server, "dropbear")];
                let names: Vec<_> = missing.iter().filter(|(root, _)| root.is_none()).map(|(_, name)| *name).collect();
                (false, format!("{} would be fetched for guests on networks (2 MB)", names.join(" and ")))
            }
        })
    }

    /// A command that enters a guest as root, by `port` of this machine, and runs `script` there. The guest's own key is not
    /// checked: the guest makes a new one each time it starts.
    #[must_use]
    pub fn command(&self, port: u16, script: &str) -> std::process::Command {
        self.command_as("root", port, script)
    }

    /// The same as another user.
    #[must_use]
    pub fn command_as(&self, user: &str, port: u16, script: &str) -> std::process::Command {
        let mut command = apt::command(&self.root, &self.root.join("usr/bin/ssh"));
        command.arg("-i").arg(&self.key).args(["-p", &port.to_string()]);
        command.args(ANY_HOST_KEY.split(' ')).args(["-o", "LogLevel=ERROR", "-o", "BatchMode=yes"]);
        command.args(["-F", "none", &format!("{user}@127.0.0.1"), script]);
        command
    }

    /// The public key, as a line of a file `authorized_keys`.
    pub(crate) fn public(&self) -> Result<String> {
        let file = self.key.with_extension("pub");
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
    }
}

/// The file of the private key with which guests are entered.
///
/// # Errors
/// No cache folder can be named.
pub fn key() -> Result<PathBuf> {
    Ok(cache::dir()?.join("ssh").join("id_ed25519"))
}

fn make_key(root: &Path, key: &Path) -> Result<()> {
    let scratch = cache::scratch()?;
    let staging = scratch.path().join("ssh");
    fs::create_dir_all(&staging)?;
    let mut command = apt::command(root, &root.join("usr/bin/ssh-keygen"));
    command.args(["-q", "-t", "ed25519", "-N", "", "-C", "tenon", "-f"]).arg(staging.join("id_ed25519"));
    let made = command.status().context("cannot start ssh-keygen")?;
    ensure!(made.success(), "ssh-keygen failed: {made}");
    cache::publish(&staging, key.parent().context("a key in no folder")?)
}

/// Files of a guest that is entered by ssh: the server with its libraries, and the client's key as the only way in. By their
/// names in the guest.
///
/// # Errors
/// What is needed cannot be fetched.
pub(crate) fn server(sh: &Shell) -> Result<BTreeMap<String, Vec<u8>>> {
    let client = Client::find(sh)?;
    let root = DROPBEAR.find(sh)?;
    let mut files = BTreeMap::new();
    let program = fs::read(root.join(SERVER))?;
    let mut open = needed(&program)?;
    files.insert("bin/dropbear".to_owned(), program);
    while let Some(name) = open.pop() {
        let target = format!("lib/{name}");
        if name.starts_with("ld-linux") || files.contains_key(&target) {
            continue;
        }
        let library = library(&root, &name).with_context(|| format!("dropbear needs {name}, which is nowhere"))?;
        open.extend(needed(&library)?);
        files.insert(target, library);
    }
    let loader = [root.join(LOADER), Path::new("/").join(LOADER)].into_iter().find(|path| path.is_file());
    let loader = loader.with_context(|| format!("dropbear needs {LOADER}, which is nowhere"))?;
    files.insert(LOADER.to_owned(), fs::read(loader)?);
    files.insert("root/.ssh/authorized_keys".to_owned(), client.public()?.into_bytes());
    files.insert("etc/passwd".to_owned(), b"root::0:0:root:/root:/bin/sh\n".to_vec());
    files.insert("etc/group".to_owned(), b"root:x:0:\n".to_vec());
    files.insert("etc/shells".to_owned(), b"/bin/sh\n".to_vec());
    Ok(files)
}

/// The library with this name, of the packages below `root` or of this machine.
fn library(root: &Path, name: &str) -> Option<Vec<u8>> {
    let folders = [root, Path::new("/")].into_iter().flat_map(|root| LIBRARIES.map(|folder| root.join(folder)));
    folders.into_iter().find_map(|folder| fs::read(folder.join(name)).ok())
}

/// The names of the libraries that a program or a library needs.
fn needed(file: &[u8]) -> Result<Vec<String>> {
    let header = FileHeader64::<Endianness>::parse(file)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, file)?;
    let Some((entries, strings)) = sections.dynamic(endian, file)? else { return Ok(Vec::new()) };
    let strings = sections.strings(endian, file, strings)?;
    let needed = entries.iter().filter(|entry| entry.tag(endian) == DT_NEEDED);
    let name =
        |entry| -> Result<String> { Ok(String::from_utf8_lossy(Dyn::string(entry, endian, strings)?).into_owned()) };
    needed.map(name).collect()
}
