//! What an image says of its process, and what a virtual machine can give of it.

use super::tree::Tree;
use anyhow::{Context, Result, bail, ensure};
use container_init::Process;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::str::FromStr;

/// The environment that every process has unless its image says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Numbers of signals that have no names, and the greatest.
const REALTIME: u8 = 34;
const GREATEST: u8 = 64;

/// An image's configuration.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Configuration {
    architecture: String,
    os: String,
    #[serde(default)]
    config: Option<Wishes>,
    pub(super) rootfs: RootFs,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct RootFs {
    /// The digests of the unpacked layers.
    pub(super) diff_ids: Vec<String>,
}

/// What is said of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Wishes {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    healthcheck: Option<serde_json::Value>,
}

/// The user of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

impl Configuration {
    /// What the image says of the process. Refuses images for other machines.
    pub(super) fn wishes(&self) -> Result<Wishes> {
        let (os, architecture) = (&self.os, &self.architecture);
        ensure!(
            os == "linux" && architecture == "amd64",
            "an image for {os} on {architecture}, and guests are linux on amd64"
        );
        let wishes = self.config.clone().unwrap_or_default();
        wishes.stop_signal()?;
        let texts = [&wishes.env, &wishes.entrypoint, &wishes.cmd].into_iter().flatten().flatten();
        let nul = texts.chain(&wishes.working_dir).any(|text| text.contains('\0'));
        ensure!(!nul, "the image's configuration has a NUL in a text");
        let bare = wishes.env.iter().flatten().find(|line| line.find('=').is_none_or(|at| at == 0));
        ensure!(bare.is_none(), "Env: {:?} is not KEY=VALUE", bare.map_or("", String::as_str));
        let folder = wishes.folder();
        ensure!(folder.starts_with('/'), "WorkingDir: {folder:?} does not begin with /");
        Ok(wishes)
    }
}

impl Wishes {
    /// What the user should know: what a container runtime would do with these wishes and a virtual machine does not.
    pub(super) fn notes(&self, name: &str) -> Vec<String> {
        let mut notes = Vec::new();
        for port in self.exposed_ports.iter().flatten().map(|(port, _)| port) {
            let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            let prefix = if protocol == "udp" { "udp:" } else { "" };
            notes.push(format!("the image serves port {port}: reach it with --forward {prefix}PORT:{name}:{number}"));
        }
        for path in self.volumes.iter().flatten().map(|(path, _)| path) {
            notes.push(format!("{path} is no volume: what is written there is lost like everything else"));
        }
        if self.healthcheck.is_some() {
            notes.push("the image's health check is not carried out".into());
        }
        notes
    }

    fn folder(&self) -> &str {
        self.working_dir.as_deref().filter(|folder| !folder.is_empty()).unwrap_or("/")
    }

    fn stop_signal(&self) -> Result<u8> {
        let Some(text) = self.stop_signal.as_deref().filter(|text| !text.is_empty()) else {
            return Ok(Signal::SIGTERM as u8);
        };
        signal(text).with_context(|| format!("StopSignal: {text:?} is no signal"))
    }

    /// Returns the user of the process, whom files of the image describe. `read` reads a file of the image; a missing file is
    /// empty.
    pub(super) fn user(&self, read: impl Fn(&str) -> Result<String>) -> Result<User> {
        let text = self.user.as_deref().unwrap_or_default();
        find_user(text, &read("etc/passwd")?, &read("etc/group")?).with_context(|| format!("User: {text:?}"))
    }

    /// The process in a guest of this name. `command`, if it is not empty, replaces the image's own.
    pub(super) fn process(&self, user: &User, hostname: &str, command: &[String]) -> Result<Process> {
        let command = if command.is_empty() { self.cmd.clone().unwrap_or_default() } else { command.to_vec() };
        let args: Vec<String> = self.entrypoint.iter().flatten().cloned().chain(command).collect();
        ensure!(
            args.first().is_some_and(|program| !program.is_empty()),
            "the image names no program: give one after --"
        );
        let mut env = self.env.clone().unwrap_or_default();
        let usual = [("PATH", PATH), ("HOSTNAME", hostname), ("TERM", "xterm"), ("HOME", &user.home)];
        for (key, value) in usual {
            if !env.iter().any(|line| line.split_once('=').is_some_and(|(known, _)| known == key)) {
                env.push(format!("{key}={value}"));
            }
        }
        Ok(Process {
            args,
            env,
            cwd: self.folder().to_owned(),
            uid: user.uid,
            gid: user.gid,
            groups: user.groups.clone(),
            hostname: hostname.to_owned(),
            stop_signal: self.stop_signal()?,
            written_mib: None,
        })
    }
}

/// Reads a file of a tree, as text. A missing one is empty.
pub(super) fn read(tree: &Tree, layers: &[std::fs::File], path: &str) -> Result<String> {
    use std::os::unix::fs::FileExt;
    let Some((layer, at, size)) = tree.regular(path)? else { return Ok(String::new()) };
    ensure!(size <= 1 << 20, "{path} has {size} bytes");
    let mut bytes = vec![0; usize::try_from(size)?];
    layers.get(layer).context("no such layer")?.read_exact_at(&mut bytes, at)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Reads a signal: a number, or a name with or without `SIG`. Those that have no names are counted: `RTMIN+3`.
fn signal(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse::<u8>() {
        return (1..=GREATEST).contains(&number).then_some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let counted = |prefix: &str| {
        name.strip_prefix(prefix).map(|rest| if rest.is_empty() { Some(0) } else { rest[1..].parse().ok() })
    };
    let number = match (counted("RTMIN"), counted("RTMAX")) {
        (Some(more), _) => REALTIME.checked_add(more?)?,
        (_, Some(less)) => GREATEST.checked_sub(less?)?,
        _ => return Signal::from_str(&format!("SIG{name}")).ok().map(|signal| signal as u8),
    };
    (REALTIME..=GREATEST).contains(&number).then_some(number)
}

/// Finds a user, given as `USER` or `USER:GROUP` by names or numbers, in the files `passwd` and `group`.
fn find_user(text: &str, passwd: &str, group: &str) -> Result<User> {
    let (user, wanted) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let lines =
        |text: &'_ str| text.lines().map(|line| line.split(':').map(str::to_owned).collect()).collect::<Vec<Vec<_>>>();
    let number = |fields: &[String], place: usize| fields.get(place).and_then(|field| field.parse::<u32>().ok());
    let id = user.parse::<u32>().ok();
    let known = lines(passwd).into_iter().find(|fields| match id {
        Some(id) => number(fields, 2) == Some(id),
        None => fields.first().is_some_and(|name| name == user),
    });
    let groups = lines(group);
    let uid = match (id, &known) {
        (Some(id), _) => id,
        (None, Some(fields)) => number(fields, 2).with_context(|| format!("{user} has no number"))?,
        (None, None) => bail!("the image's /etc/passwd has no user {user}"),
    };
    let gid = match wanted.filter(|wanted| !wanted.is_empty()) {
        Some(wanted) => match wanted.parse() {
            Ok(number) => number,
            Err(_) => {
                let found = groups.iter().find(|fields| fields.first().is_some_and(|name| name == wanted));
                let found = found.and_then(|fields| number(fields, 2));
                found.with_context(|| format!("the image's /etc/group has no group {wanted}"))?
            }
        },
        None => known.as_ref().and_then(|fields| number(fields, 3)).unwrap_or(0),
    };
    let mut more = Vec::new();
    if let (None, Some(name)) = (wanted, known.as_ref().and_then(|fields| fields.first())) {
        let member = |fields: &&Vec<String>| fields.get(3).is_some_and(|names| names.split(',').any(|it| it == name));
        more = groups.iter().filter(member).filter_map(|fields| number(fields, 2)).collect();
    }
    let home = known.as_ref().and_then(|fields| fields.get(5)).filter(|home| !home.is_empty());
    let home = home.cloned().unwrap_or_else(|| if uid == 0 { "/root".into() } else { "/".into() });
    Ok(User { uid, gid, groups: more, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\nodd:x:none:0::/:\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\nlog:x:44:root,app\nempty:x::\n";

    fn found(text: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        let user = find_user(text, PASSWD, GROUP).map_err(|why| format!("{why:#}"))?;
        Ok((user.uid, user.gid, user.groups, user.home))
    }

    #[test]
    fn users_have_names_or_numbers() {
        assert_eq!(found(""), Ok((0, 0, vec![44], "/root".into())));
        assert_eq!(found("app"), Ok((1000, 1001, vec![44], "/home/app".into())));
        assert_eq!(found("1000"), found("app"));
        assert_eq!(found("app:log"), Ok((1000, 44, vec![], "/home/app".into())));
        assert_eq!(found("7:8"), Ok((7, 8, vec![], "/".into())));
        assert_eq!(found("7"), Ok((7, 0, vec![], "/".into())));
        assert_eq!(found("db"), Err("the image's /etc/passwd has no user db".into()));
        assert_eq!(found("odd"), Err("odd has no number".into()));
        assert_eq!(found("app:db"), Err("the image's /etc/group has no group db".into()));
        assert!(found("app:empty").is_err());
        assert_eq!(find_user("", "", "").unwrap().home, "/root");
    }

    #[test]
    fn signals_have_names_or_numbers() {
        for (text, number) in
            [("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGQUIT", 3), ("SIGRTMIN+3", 37), ("RTMAX-1", 63)]
        {
            assert_eq!(signal(text), Some(number), "{text}");
        }
        for text in ["", "0", "65", "SIGNONE", "RTMIN+40", "RTMIN+x", "RTMAX-200", "SIG", "RTMIN+"] {
            assert_eq!(signal(text), None, "{text}");
        }
    }

    fn wishes(config: &str) -> Result<Wishes> {
        let text = format!(
            "{{\"architecture\":\"amd64\",\"os\":\"linux\",\"rootfs\":{{\"diff_ids\":[]}},\"config\":{config}}}"
        );
        serde_json::from_str::<Configuration>(&text)?.wishes()
    }

    #[test]
    fn words_replace_the_command_and_not_the_entrypoint() {
        let user = find_user("app", PASSWD, GROUP).unwrap();
        let all =
            wishes(r#"{"Entrypoint":["run","-v"],"Cmd":["a"],"Env":["PATH=/x","A=b=c"],"WorkingDir":"/srv"}"#).unwrap();
        let process = all.process(&user, "web", &[]).unwrap();
        assert_eq!(process.args, ["run", "-v", "a"]);
        assert_eq!(process.env, ["PATH=/x", "A=b=c", "HOSTNAME=web", "TERM=xterm", "HOME=/home/app"]);
        assert_eq!((process.cwd.as_str(), process.uid, process.stop_signal), ("/srv", 1000, 15));
        assert_eq!(all.process(&user, "web", &["b".into(), "c".into()]).unwrap().args, ["run", "-v", "b", "c"]);
        let none = wishes("null").unwrap();
        assert_eq!(none.process(&user, "web", &["sh".into()]).unwrap().args, ["sh"]);
        let why = none.process(&user, "web", &[]).unwrap_err().to_string();
        assert_eq!(why, "the image names no program: give one after --");
    }

    #[test]
    fn what_a_machine_cannot_give_is_told() {
        let all =
            wishes(r#"{"ExposedPorts":{"80/tcp":{},"53/udp":{}},"Volumes":{"/data":{}},"Healthcheck":{}}"#).unwrap();
        let notes = all.notes("web");
        assert_eq!(notes.len(), 4, "{notes:?}");
        assert!(
            notes[0].ends_with("--forward udp:PORT:web:53") && notes[1].ends_with("--forward PORT:web:80"),
            "{notes:?}"
        );
        for (config, why) in [
            (r#"{"StopSignal":"SIGX"}"#, "StopSignal: \"SIGX\" is no signal"),
            (r#"{"Env":["A"]}"#, "Env: \"A\" is not KEY=VALUE"),
            (r#"{"WorkingDir":"srv"}"#, "WorkingDir: \"srv\" does not begin with /"),
            (r#"{"Cmd":["a\u0000"]}"#, "the image's configuration has a NUL in a text"),
        ] {
            assert_eq!(wishes(config).unwrap_err().to_string(), why);
        }
        let other = r#"{"architecture":"arm64","os":"linux","rootfs":{"diff_ids":[]}}"#;
        let why = serde_json::from_str::<Configuration>(other).unwrap().wishes().unwrap_err().to_string();
        assert_eq!(why, "an image for linux on arm64, and guests are linux on amd64");
    }
}
