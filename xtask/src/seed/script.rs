//! The scripts that carry a seed out in a guest without cloud-init.

use super::network::Network;
use super::user_data::{Encoding, File, Password, Secret, User, UserData};
use std::fmt::Write;

/// What the lines of a script call.
const FUNCTIONS: &str = include_str!("functions.sh");

/// A word for a shell.
pub(crate) fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A script: lines that each call a function. A line that fails is named, and the others are carried out.
struct Script(String);

impl Script {
    fn new() -> Self {
        Self(FUNCTIONS.to_owned())
    }

    fn step(&mut self, name: &str, function: &str, words: &[&str]) {
        let words: String = words.iter().map(|word| format!(" {}", quote(word))).collect();
        let _ = writeln!(self.0, "step {} {function}{words}", quote(name));
    }

    fn finish(mut self) -> String {
        self.0.push_str("exit \"$failed\"\n");
        self.0
    }

    fn file(&mut self, file: &File) {
        let encoding = match file.encoding {
            Encoding::Plain => "plain",
            Encoding::Base64 => "base64",
            Encoding::GzipBase64 => "gzip",
        };
        let how = if file.append { "append" } else { "new" };
        let words = [&*file.path, &file.mode, &file.owner, how, encoding, &file.content];
        self.step(&format!("write_files: {}", file.path), "write_file", &words);
    }

    fn user(&mut self, user: &User) {
        let (step, name) = (format!("users: {}", user.name), &*user.name);
        self.step(&step, "account", &[name, &user.gecos, &user.shell, &user.groups.join(",")]);
        if let Some(secret) = &user.password {
            self.password(&step, name, secret);
        }
        if user.locked {
            self.step(&step, "lock", &[name]);
        }
        if !user.sudo.is_empty() {
            let rules: String = user.sudo.iter().map(|rule| format!("{name} {rule}\n")).collect();
            self.step(&step, "sudo_rules", &[name, &rules]);
        }
        if !user.keys.is_empty() {
            let keys: String = user.keys.iter().map(|key| format!("{key}\n")).collect();
            self.step(&step, "keys", &[name, &keys]);
        }
    }

    fn password(&mut self, step: &str, name: &str, secret: &Secret) {
        match secret {
            Secret::Plain(text) => self.step(step, "password", &[name, text]),
            Secret::Hash(text) => self.step(step, "password", &[name, text, "-e"]),
        }
    }
}

/// The script that is carried out before the guest has a network. `host` is the guest's name, and its name with a domain.
pub(crate) fn early(data: &UserData, network: &Network, host: Option<(&str, &str)>, unknown: &[String]) -> String {
    let mut script = Script::new();
    for what in unknown {
        let _ =
            writeln!(script.0, "say {}", quote(&format!("{what}: not known here, and left out: it needs cloud-init")));
    }
    if let Some((short, full)) = host {
        script.step("hostname", "host_name", &[short, full]);
    }
    for device in &network.devices {
        let path = format!("/etc/systemd/network/10-seed-{}.network", device.name);
        script.step(&device.name, "write_file", &[&path, "0644", "root:root", "new", "plain", &device.text]);
    }
    for file in data.files.iter().filter(|file| !file.deferred) {
        script.file(file);
    }
    for user in &data.users {
        script.user(user);
    }
    for Password { name, secret } in &data.passwords {
        script.password("passwords", name, secret);
        if data.expire {
            script.step("passwords", "expire", &[name]);
        }
    }
    if let Some(allowed) = data.ssh_passwords {
        let text = format!("PasswordAuthentication {}\n", if allowed { "yes" } else { "no" });
        let path = "/etc/ssh/sshd_config.d/10-seed.conf";
        script.step("ssh_pwauth", "write_file", &[path, "0644", "root:root", "new", "plain", &text]);
    }
    script.finish()
}

/// The script that is carried out when the guest has started and has a network; `None` if there is nothing to do.
pub(crate) fn late(data: &UserData) -> Option<String> {
    let mut script = Script::new();
    let begin = script.0.len();
    if data.update || data.upgrade || !data.packages.is_empty() {
        script.step("package_update", "apt", &["update"]);
    }
    if data.upgrade {
        script.step("package_upgrade", "apt", &["upgrade"]);
    }
    if !data.packages.is_empty() {
        let words: Vec<&str> = ["install"].into_iter().chain(data.packages.iter().map(String::as_str)).collect();
        script.step("packages", "apt", &words);
    }
    for file in data.files.iter().filter(|file| file.deferred) {
        script.file(file);
    }
    if !data.commands.is_empty() {
        let commands: String = data.commands.iter().map(|command| format!("{command}\n")).collect();
        script.step("runcmd", "commands", &[&commands]);
    }
    (script.0.len() > begin).then(|| script.finish())
}
