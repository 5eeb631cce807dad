//! User-data of the form `#cloud-config`, as far as a guest without cloud-init carries it out.
//!
//! The meaning of each key is cloud-init's. Keys that are not known here are noted with their lines: cloud-init may know them.

use super::yaml::{self, Entry, Node, Value, Wrong};
use super::{check_host_name, keys};

/// The user that a cloud image of Debian has if the user-data names no others.
const DEFAULT_USER: &str = "debian";
/// The first line.
const HEADER: &str = "#cloud-config";

/// What user-data asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UserData {
    pub(crate) hostname: Option<String>,
    pub(crate) fqdn: Option<String>,
    pub(crate) users: Vec<User>,
    pub(crate) passwords: Vec<Password>,
    /// Whether the passwords must be changed at the first login.
    pub(crate) expire: bool,
    /// Whether sshd takes passwords. `None`: as the image has it.
    pub(crate) ssh_passwords: Option<bool>,
    pub(crate) files: Vec<File>,
    pub(crate) packages: Vec<String>,
    pub(crate) update: bool,
    pub(crate) upgrade: bool,
    /// Lines of a shell script.
    pub(crate) commands: Vec<String>,
    /// Lines and names of keys that are not known here.
    pub(crate) unknown: Vec<(usize, String)>,
    /// The lines of `hostname` or `fqdn`.
    pub(crate) host_line: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) gecos: String,
    pub(crate) shell: String,
    pub(crate) groups: Vec<String>,
    pub(crate) sudo: Vec<String>,
    pub(crate) keys: Vec<String>,
    pub(crate) password: Option<Secret>,
    /// Whether the password is locked.
    pub(crate) locked: bool,
}

/// A password, or what `crypt` makes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Secret {
    Plain(String),
    Hash(String),
}

/// A password of a user that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Password {
    pub(crate) name: String,
    pub(crate) secret: Secret,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) path: String,
    pub(crate) content: String,
    pub(crate) encoding: Encoding,
    pub(crate) owner: String,
    /// Octal.
    pub(crate) mode: String,
    pub(crate) append: bool,
    /// Whether it is written after the packages.
    pub(crate) deferred: bool,
}

/// How a file's content is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Plain,
    Base64,
    GzipBase64,
}

impl User {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), shell: "/bin/bash".into(), locked: true, ..Self::default() }
    }

    fn default_one() -> Self {
        Self {
            gecos: "Debian".into(),
            groups: ["adm", "sudo"].map(str::to_owned).into(),
            sudo: vec!["ALL=(ALL) NOPASSWD:ALL".into()],
            ..Self::new(DEFAULT_USER)
        }
    }
}

/// Settings at the top that are the default user's.
#[derive(Default)]
struct OfDefault {
    keys: Vec<String>,
    password: Option<Secret>,
}

impl UserData {
    /// Reads user-data. `keys` are those of the default user that are given elsewhere.
    ///
    /// # Errors
    /// The text is no `#cloud-config`, no YAML, or a value cannot be what it is meant to be.
    pub(crate) fn read(text: &str, keys: &[String]) -> Result<Self, Wrong> {
        let first = text.lines().next().unwrap_or_default();
        if first.trim_end() != HEADER {
            return Err(Wrong::new(1, format!("the first line must be {HEADER}")));
        }
        let mut data = Self { expire: true, ..Self::default() };
        let mut default = OfDefault { keys: keys.to_vec(), password: None };
        let (mut users, root) = (None, yaml::read(text)?);
        let entries = match &root {
            Some(root) => root.map(HEADER)?,
            None => &[],
        };
        for entry in entries.iter().filter(|entry| !entry.node.is_nothing()) {
            data.set(entry, &mut default, &mut users)?;
        }
        data.users = users.unwrap_or_else(|| vec![User::default_one()]);
        match (data.users.iter_mut().find(|user| user.name == DEFAULT_USER), default.password) {
            (Some(user), password) => {
                user.keys.extend(default.keys);
                let name = user.name.clone();
                data.passwords.extend(password.map(|secret| Password { name, secret }));
            }
            (None, None) if default.keys.is_empty() => {}
            (None, _) => {
                let why = "`users` leaves out the default user, and keys or a password are for this user";
                return Err(Wrong::new(1, why));
            }
        }
        Ok(data)
    }

    fn set(&mut self, entry: &Entry, default: &mut OfDefault, users: &mut Option<Vec<User>>) -> Result<(), Wrong> {
        let (key, node) = (&*entry.key, &entry.node);
        match key {
            "hostname" | "fqdn" => {
                let name = node.line_of_text(key)?;
                check_host_name(name).map_err(|why| Wrong::new(node.line, format!("{key}: {why}")))?;
                self.host_line = entry.line;
                *(if key == "fqdn" { &mut self.fqdn } else { &mut self.hostname }) = Some(name.to_owned());
            }
            "users" => *users = Some(self.users(node)?),
            "ssh_authorized_keys" => default.keys.extend(public_keys(node)?),
            "password" => default.password = Some(secret(node.line_of_text(key)?)),
            "chpasswd" => self.set_passwords(node)?,
            "ssh_pwauth" => self.ssh_passwords = Some(node.flag(key)?),
            "write_files" => {
                for item in node.list(key)? {
                    let file = self.file(item)?;
                    self.files.push(file);
                }
            }
            "packages" => self.packages = node.list(key)?.iter().map(package).collect::<Result<_, _>>()?,
            "package_update" => self.update = node.flag(key)?,
            "package_upgrade" => self.upgrade = node.flag(key)?,
            "runcmd" => self.commands = node.list(key)?.iter().map(command).collect::<Result<_, _>>()?,
            _ => self.leave_out(entry, ""),
        }
        Ok(())
    }

    fn leave_out(&mut self, entry: &Entry, within: &str) {
        self.unknown.push((entry.line, format!("{within}{}", entry.key)));
    }

    fn users(&mut self, node: &Node) -> Result<Vec<User>, Wrong> {
        let mut users = Vec::new();
        for item in node.list("users")? {
            match &item.value {
                Value::Map(entries) => users.push(self.user(item, entries)?),
                _ if item.text("users")? == "default" => users.push(User::default_one()),
                _ => users.push(User::new(user_name(item)?)),
            }
        }
        Ok(users)
    }

    fn user(&mut self, item: &Node, entries: &[Entry]) -> Result<User, Wrong> {
        let named = entries.iter().find(|entry| entry.key == "name");
        let named = named.ok_or_else(|| Wrong::new(item.line, "users: a user without a name"))?;
        let mut user = User::new(user_name(&named.node)?);
        for entry in entries.iter().filter(|entry| !entry.node.is_nothing()) {
            let (key, node) = (&*entry.key, &entry.node);
            match key {
                "name" => {}
                "gecos" => user.gecos = node.line_of_text(key)?.to_owned(),
                "shell" => user.shell = node.line_of_text(key)?.to_owned(),
                "groups" => user.groups = node.words(key)?,
                "sudo" => user.sudo = sudo(node)?,
                "ssh_authorized_keys" => user.keys = public_keys(node)?,
                "lock_passwd" => user.locked = node.flag(key)?,
                "plain_text_passwd" => user.password = Some(Secret::Plain(node.line_of_text(key)?.to_owned())),
                "passwd" | "hashed_passwd" => user.password = Some(Secret::Hash(hash(node, key)?)),
                _ => self.leave_out(entry, "users: "),
            }
        }
        Ok(user)
    }

    fn set_passwords(&mut self, node: &Node) -> Result<(), Wrong> {
        for entry in node.map("chpasswd")?.iter().filter(|entry| !entry.node.is_nothing()) {
            let (key, node) = (&*entry.key, &entry.node);
            match key {
                "expire" => self.expire = node.flag(key)?,
                "list" => {
                    let lines = match &node.value {
                        Value::List(_) => node.lines(key)?,
                        _ => node.text(key)?.lines().map(str::to_owned).collect(),
                    };
                    for line in lines {
                        let (name, text) = line
                            .split_once(':')
                            .ok_or_else(|| Wrong::new(node.line, "chpasswd: list: a line must be NAME:PASSWORD"))?;
                        self.password(node, name, secret(text))?;
                    }
                }
                "users" => {
                    for item in node.list(key)? {
                        self.password_of(item)?;
                    }
                }
                _ => self.leave_out(entry, "chpasswd: "),
            }
        }
        Ok(())
    }

    fn password_of(&mut self, item: &Node) -> Result<(), Wrong> {
        let (mut name, mut text, mut kind) = (None, None, "hash");
        for entry in item.map("chpasswd: users")? {
            let (key, node) = (&*entry.key, &entry.node);
            match key {
                "name" => name = Some(user_name(node)?),
                "password" => text = Some(node.line_of_text(key)?.to_owned()),
                "type" => kind = node.line_of_text(key)?,
                _ => self.leave_out(entry, "chpasswd: users: "),
            }
        }
        let (Some(name), Some(text)) = (name, text) else {
            return Err(Wrong::new(item.line, "chpasswd: users: a name and a password are needed"));
        };
        match kind {
            "hash" => self.password(item, name, Secret::Hash(text)),
            "text" => self.password(item, name, Secret::Plain(text)),
            _ => Err(Wrong::new(item.line, format!("chpasswd: users: the type {kind} is not known"))),
        }
    }

    fn password(&mut self, node: &Node, name: &str, secret: Secret) -> Result<(), Wrong> {
        check_user_name(name).map_err(|why| Wrong::new(node.line, format!("chpasswd: {why}")))?;
        let random = matches!(&secret, Secret::Plain(text) if text == "R" || text == "RANDOM");
        if random {
            return Err(Wrong::new(node.line, "chpasswd: random passwords are not made here"));
        }
        self.passwords.push(Password { name: name.to_owned(), secret });
        Ok(())
    }

    fn file(&mut self, item: &Node) -> Result<File, Wrong> {
        let mut file = File {
            path: String::new(),
            content: String::new(),
            encoding: Encoding::Plain,
            owner: "root:root".into(),
            mode: "0644".into(),
            append: false,
            deferred: false,
        };
        for entry in item.map("write_files")?.iter().filter(|entry| !entry.node.is_nothing()) {
            let (key, node) = (&*entry.key, &entry.node);
            match key {
                "path" => file.path = node.line_of_text(key)?.to_owned(),
                "content" => file.content = node.text(key)?.to_owned(),
                "encoding" => file.encoding = encoding(node)?,
                "owner" => file.owner = node.line_of_text(key)?.to_owned(),
                "permissions" => file.mode = mode(node)?,
                "append" => file.append = node.flag(key)?,
                "defer" => file.deferred = node.flag(key)?,
                _ => self.leave_out(entry, "write_files: "),
            }
        }
        let absolute = file.path.starts_with('/') && !file.path.ends_with('/');
        let wrong = |why: &str| Wrong::new(item.line, format!("write_files: {why}"));
        if !absolute {
            return Err(wrong("`path` must be the absolute path of a file"));
        }
        if file.encoding != Encoding::Plain && keys::decode(&file.content).is_none() {
            return Err(wrong(&format!("the content of {} is not base64", file.path)));
        }
        Ok(file)
    }
}

/// A user's name, as `useradd` of Debian takes it.
fn check_user_name(name: &str) -> Result<(), String> {
    let begins = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-.".contains(c);
    match begins && name.len() <= 32 && name.chars().all(allowed) {
        true => Ok(()),
        false => Err(format!("{name:?} is no name of a user")),
    }
}

fn user_name(node: &Node) -> Result<&str, Wrong> {
    let name = node.line_of_text("name")?;
    check_user_name(name).map_err(|why| Wrong::new(node.line, format!("users: {why}")))?;
    Ok(name)
}

fn public_keys(node: &Node) -> Result<Vec<String>, Wrong> {
    let lines = node.list("ssh_authorized_keys")?.iter().map(|item| {
        let key = item.text("ssh_authorized_keys")?.trim();
        // There may be options in front of a key, so it is only a private one that is refused.
        if keys::is_private(key) || key.lines().count() != 1 {
            return Err(Wrong::new(item.line, "ssh_authorized_keys: this is no public key"));
        }
        Ok(key.to_owned())
    });
    lines.collect()
}

/// Rules of `sudo`; `false` is none.
fn sudo(node: &Node) -> Result<Vec<String>, Wrong> {
    match &node.value {
        Value::List(_) => node.lines("sudo"),
        _ if node.flag("sudo") == Ok(false) => Ok(Vec::new()),
        _ => Ok(vec![node.line_of_text("sudo")?.to_owned()]),
    }
}

/// Whether a text has the form of what `crypt` makes of a password.
fn is_hash(text: &str) -> bool {
    let kind = text.strip_prefix('$').and_then(|rest| rest.split_once('$'));
    kind.is_some_and(|(kind, rest)| {
        ["1", "2a", "2b", "2y", "5", "6", "y", "gy", "7"].contains(&kind) && rest.contains('$')
    })
}

fn secret(text: &str) -> Secret {
    if is_hash(text) { Secret::Hash(text.to_owned()) } else { Secret::Plain(text.to_owned()) }
}

fn hash(node: &Node, key: &str) -> Result<String, Wrong> {
    let text = node.line_of_text(key)?;
    // A password that is given here by mistake would be public, and would let nobody in.
    if !is_hash(text) {
        return Err(Wrong::new(
            node.line,
            format!("{key}: must be a hash of a password, as `openssl passwd -6` makes it"),
        ));
    }
    Ok(text.to_owned())
}

fn encoding(node: &Node) -> Result<Encoding, Wrong> {
    match node.line_of_text("encoding")? {
        "text/plain" => Ok(Encoding::Plain),
        "b64" | "base64" => Ok(Encoding::Base64),
        "gz+b64" | "gz+base64" | "gzip+b64" | "gzip+base64" => Ok(Encoding::GzipBase64),
        other => Err(Wrong::new(node.line, format!("encoding: {other} cannot be read: use b64 or gz+b64"))),
    }
}

fn mode(node: &Node) -> Result<String, Wrong> {
    let text = node.line_of_text("permissions")?;
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match (3..=5).contains(&digits.len()) && digits.bytes().all(|byte| (b'0'..=b'7').contains(&byte)) {
        true => Ok(digits.to_owned()),
        false => Err(Wrong::new(node.line, format!("permissions: {text} is no octal mode like 0644"))),
    }
}

/// A package's name, or a list of its name and its version.
fn package(node: &Node) -> Result<String, Wrong> {
    let words = match &node.value {
        Value::List(_) => node.lines("packages")?,
        _ => vec![node.line_of_text("packages")?.to_owned()],
    };
    let text = words.join("=");
    let plain = |c: char| c.is_ascii_alphanumeric() || "+-.:=~/".contains(c);
    match words.len() <= 2 && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(plain) {
        true => Ok(text),
        false => Err(Wrong::new(node.line, format!("packages: {text:?} is no name of a package"))),
    }
}

/// A command: a line for the shell, or a list of words.
fn command(node: &Node) -> Result<String, Wrong> {
    match &node.value {
        Value::List(words) => {
            let words = words.iter().map(|word| word.text("runcmd").map(super::script::quote));
            Ok(words.collect::<Result<Vec<_>, _>>()?.join(" "))
        }
        _ => Ok(node.text("runcmd")?.to_owned()),
    }
}
