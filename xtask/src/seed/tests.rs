//! What is read of a seed, what is refused, and what the guest is given.

use super::*;
use std::process::Command;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl me@here";

/// A folder with user-data, a key and a network configuration.
struct Files(tempfile::TempDir);

impl Files {
    fn new(user_data: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("u"), user_data).unwrap();
        fs::write(folder.path().join("key.pub"), KEY).unwrap();
        fs::write(folder.path().join("n"), "version: 2\nethernets: {eth0: {addresses: [10.0.0.2/24]}}\n").unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, options: Wishes) -> Result<Seed, String> {
        let seed = Seed::read(&Wishes { user_data: Some(self.path("u")), ..options });
        let folder = format!("{}/", self.0.path().display());
        seed.map(|seed| seed.unwrap()).map_err(|why| format!("{why:#}").replace(&folder, ""))
    }
}

fn file<'a>(seed: &'a Seed, wanted: &str) -> &'a str {
    seed.files.iter().find(|(name, _)| *name == wanted).map(|(_, text)| &**text).unwrap_or_default()
}

fn id(seed: &Seed) -> &str {
    file(seed, "meta-data").lines().next().unwrap()
}

/// Everything that is known.
const ALL: &str = r"#cloud-config
hostname: web
fqdn: web.example.org
users:
  - default
  - name: ann
    gecos: Ann O'Neill
    groups: [adm, users]
    sudo: ALL=(ALL) ALL
    shell: /bin/sh
    lock_passwd: false
    plain_text_passwd: it's secret
    ssh_authorized_keys:
      - ssh-rsa AAAA ann
  - {name: bob, passwd: $6$a$b, sudo: false, groups: 'a, b', color: red}
ssh_authorized_keys: [ssh-ed25519 BBBB]
password: first
chpasswd: {expire: false, list: ['bob:x']}
ssh_pwauth: yes
timezone: Europe/Paris
write_files:
  - {path: /etc/a b, content: 'x $y `z`', permissions: 0600}
  - {path: /etc/c, content: eA==, encoding: b64, append: true, owner: 'ann:users', defer: true}
packages: [vim, [git, '1:2.3']]
package_update: true
runcmd:
  - echo $HOME
  - [echo, it's, a  b]
";

#[test]
fn what_is_known_becomes_steps() {
    let files = Files::new(ALL);
    let seed = files.read(Wishes::default()).unwrap();
    assert_eq!(seed.unknown, ["user-data:15: users: color", "user-data:20: timezone"]);
    let (early, late) = (file(&seed, "tenon-early"), file(&seed, "tenon-late"));
    for line in [
        "step hostname host_name web web.example.org",
        "step 'users: debian' account debian Debian /bin/bash adm,sudo",
        "step 'users: debian' sudo_rules debian 'debian ALL=(ALL) NOPASSWD:ALL\n'",
        "step 'users: debian' keys debian 'ssh-ed25519 BBBB\n'",
        r"step 'users: ann' account ann 'Ann O'\''Neill' /bin/sh adm,users",
        r"step 'users: ann' password ann 'it'\''s secret'",
        "step 'users: ann' keys ann 'ssh-rsa AAAA ann\n'",
        "step 'users: bob' account bob '' /bin/bash a,b",
        "step 'users: bob' password bob '$6$a$b' -e",
        "step 'users: bob' lock bob",
        "step passwords password debian first",
        "step passwords password bob x",
        "step ssh_pwauth write_file /etc/ssh/sshd_config.d/10-seed.conf 0644 root:root new plain 'PasswordAuthentication yes\n'",
        "step 'write_files: /etc/a b' write_file '/etc/a b' 0600 root:root new plain 'x $y `z`'",
        "say 'user-data:20: timezone: not known here, and left out: it needs cloud-init'",
    ] {
        assert!(early.contains(&format!("\n{line}\n")), "{line} is not in:\n{early}");
    }
    for line in ["lock ann", "sudo_rules bob", "expire", "/etc/c"] {
        assert!(!early.contains(&format!("{line}\n")), "{line} is in:\n{early}");
    }
    for line in [
        "step package_update apt update",
        "step packages apt install vim git=1:2.3",
        "step 'write_files: /etc/c' write_file /etc/c 0644 ann:users append base64 eA==",
        r"step runcmd commands 'echo $HOME
echo '\''it'\''\'\'''\''s'\'' '\''a  b'\''
'",
    ] {
        assert!(late.contains(&format!("\n{line}\n")), "{line} is not in:\n{late}");
    }
}

/// Shells read the scripts as they are meant. Steps that fail are named, and the others carried out.
#[test]
fn scripts_are_carried_out() {
    let folder = tempfile::tempdir().unwrap();
    let [one, two] = ["a/one's", "two"].map(|name| folder.path().join(name).display().to_string());
    let owner = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
    let owner = owner.trim();
    let files = Files::new(&format!(
        "#cloud-config\nusers: []\nwrite_files:\n\
         - {{path: \"{one}\", content: \"it's $HOME `x`\\\\n\\n\\n\", owner: {owner}, permissions: '0640'}}\n\
         - {{path: {two}, content: x, owner: 'no such:user'}}\n\
         - {{path: \"{one}\", content: H4sIAAAAAAAC/8tIzcnJBwCGphA2BQAAAA==, encoding: gz+b64, owner: {owner}, append: true}}\n\
         runcmd: ['echo \"$((1 + 1))\" > {two}', [touch, \"{one} b\"]]\n"
    ));
    let seed = files.read(Wishes::default()).unwrap();
    let run = |script: &str| {
        let output = Command::new("sh").args(["-c", file(&seed, script)]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (status, said) = run("tenon-early");
    assert_eq!((status, &*said), (Some(1), &*format!("tenon-seed: write_files: {two}: failed\n")));
    let content = fs::read_to_string(&one).unwrap();
    assert!(content.starts_with("it's $HOME `x`\\n\n\n"), "{content:?}");
    assert_eq!(run("tenon-late"), (Some(0), String::new()));
    assert_eq!(fs::read_to_string(&two).unwrap(), "2\n");
    assert!(folder.path().join("a/one's b").is_file());
}

#[test]
fn the_instance_changes_with_what_is_said() {
    let files = Files::new("#cloud-config\nhostname: a\n");
    let read = |options| id(&files.read(options).unwrap()).to_owned();
    let first = read(Wishes::default());
    assert_eq!(read(Wishes::default()), first);
    let keys = Wishes::new(None, vec![files.path("key.pub")]);
    let ids = [
        read(keys.clone()),
        read(Wishes::new(Some("a".into()), Vec::new())),
        read(Wishes::default().with_network_config(files.path("n"))),
        id(&Files::new("#cloud-config\nhostname: b\n").read(Wishes::default()).unwrap()).to_owned(),
    ];
    let all: std::collections::BTreeSet<_> = ids.iter().chain([&first]).collect();
    assert_eq!(all.len(), 5, "{ids:?} {first}");
    let seed = Seed::read(&Wishes { hostname: Some("web.lan".into()), ..keys }).unwrap().unwrap();
    let meta = file(&seed, "meta-data");
    assert!(meta.ends_with(&format!("local-hostname: \"web.lan\"\npublic-keys:\n  - \"{KEY}\"\n")), "{meta}");
    assert!(file(&seed, "tenon-early").contains("host_name web web.lan\n"));
    assert!(file(&seed, "tenon-early").contains(&format!("keys debian '{KEY}\n'\n")));
    assert!(Seed::read(&Wishes::default()).unwrap().is_none());
}

#[test]
fn bad_user_data_is_one_line_with_its_place() {
    for (text, why) in [
        ("", "u:1: the first line must be #cloud-config"),
        ("#!/bin/sh\necho\n", "u:1: the first line must be #cloud-config"),
        ("hostname: a\n", "u:1: the first line must be #cloud-config"),
        ("#cloud-config\nhostname: [a\n", "u:3: no YAML: "),
        ("#cloud-config\nhostname: a\nhostname: b\n", "u:3: no YAML: "),
        ("#cloud-config\n- a\n", "u:2: #cloud-config: must be a map of keys and values"),
        ("#cloud-config\nhostname: a_b\n", "u:2: hostname: \"a_b\" is no name of a host"),
        ("#cloud-config\nhostname: [a]\n", "u:2: hostname: must be a text"),
        ("#cloud-config\nusers: ann\n", "u:2: users: must be a list"),
        ("#cloud-config\nusers:\n  - gecos: A\n", "u:3: users: a user without a name"),
        ("#cloud-config\nusers: [{name: Ann}]\n", "u:2: users: \"Ann\" is no name of a user"),
        ("#cloud-config\nusers: ['-o']\n", "u:2: users: \"-o\" is no name of a user"),
        ("#cloud-config\nusers:\n- name: a\n  passwd: secret\n", "u:4: passwd: must be a hash"),
        ("#cloud-config\nusers:\n- name: a\n  lock_passwd: maybe\n", "u:4: lock_passwd: must be true or false"),
        ("#cloud-config\nusers: []\npassword: a\n", "u:1: `users` leaves out the default user"),
        ("#cloud-config\nssh_authorized_keys: ['-----BEGIN OPENSSH PRIVATE KEY-----']\n", "u:2: ssh_authorized_keys: "),
        ("#cloud-config\nchpasswd: {list: [root]}\n", "u:2: chpasswd: list: a line must be NAME:PASSWORD"),
        ("#cloud-config\nchpasswd: {list: ['root:R']}\n", "u:2: chpasswd: random passwords"),
        ("#cloud-config\nwrite_files: [{content: a}]\n", "u:2: write_files: `path` must be"),
        ("#cloud-config\nwrite_files:\n- path: /a\n  permissions: 0899\n", "u:4: permissions: 0899 is no octal mode"),
        ("#cloud-config\nwrite_files:\n- path: /a\n  encoding: gzip\n", "u:4: encoding: gzip cannot be read"),
        (
            "#cloud-config\nwrite_files:\n- {path: /a, encoding: b64, content: a}\n",
            "u:3: write_files: the content of /a",
        ),
        ("#cloud-config\npackages: [-o]\n", "u:2: packages: \"-o\" is no name of a package"),
        ("#cloud-config\nruncmd: echo\n", "u:2: runcmd: must be a list"),
        ("#cloud-config\nruncmd: [\"a\\0b\"]\n", "u:2: runcmd: a NUL in a text"),
    ] {
        let refusal = Files::new(text).read(Wishes::default()).unwrap_err();
        assert!(refusal.starts_with(&format!("--user-data: {why}")), "{text}: {refusal}");
        assert_eq!(refusal.lines().count(), 1, "{refusal}");
    }
}

#[test]
fn other_bad_files_are_told() {
    let files = Files::new("#cloud-config\nfqdn: db.lan\n");
    let why = files.read(Wishes::new(Some("web".into()), Vec::new())).unwrap_err();
    assert_eq!(why, "--user-data: u:2: names the host db.lan, and --hostname web");
    let why = files.read(Wishes::new(None, vec![files.path("none")])).unwrap_err();
    assert!(why.starts_with("--ssh-key: none: no such file"), "{why}");
    let why = files.read(Wishes::default().with_network_config(files.path("u"))).unwrap_err();
    assert_eq!(why, "--network-config: u:2: has no `version: 2`");
    fs::write(files.path("u"), b"#cloud-config\nhostname: \xff\n").unwrap();
    assert_eq!(files.read(Wishes::default()).unwrap_err(), "--user-data: u: is no text in UTF-8");
    fs::write(files.path("u"), vec![b'#'; (1 << 20) + 1]).unwrap();
    assert_eq!(files.read(Wishes::default()).unwrap_err(), "--user-data: u: has more than 1048576 bytes");
    fs::remove_file(files.path("u")).unwrap();
    assert!(files.read(Wishes::default()).unwrap_err().starts_with("--user-data: u: no such file"));
    for name in ["", "a b", "-a", "a-", "a..b", &"a".repeat(65), "é", "a\nb"] {
        assert!(host_name(name).is_err(), "{name}");
    }
    assert!(host_name("web-1.example.org").is_ok());
}
