//! `cargo xtask doctor`: what the machine has and lacks, and what would be fetched or built for it.

use anyhow::{Result, bail};
use std::fs;
use std::path::Path;
use xshell::{Shell, cmd};
use xtask::debian::User;
use xtask::{cache, ext4, grub, kernels, qemu, ssh, sysroot};

/// Memory the tests need on the host, in KiB: two machines of 1 GiB at a time, and the compiler beside them.
const MEMORY: u64 = 3 << 20;

/// What was found out about one thing.
enum Finding {
    Good(String),
    /// Missing, but xtask gets it by itself when it is first needed.
    Later(String),
    Bad(String),
}
use Finding::{Bad, Good, Later};

/// Prints one line each; an error if something is missing that xtask cannot get.
pub(crate) fn doctor(sh: &Shell) -> Result<()> {
    let mut findings = vec![("compiler", compiler(sh))];
    findings.extend(["clippy", "fmt"].map(|tool| (tool, component(sh, tool))));
    findings.push(("bare metal", ready(sysroot::state(sh))));
    findings.push(("emulator", ready(qemu::Qemu::state())));
    findings.push(("processor", processor()));
    findings.extend(kernels::names().map(|name| ("guest kernel", kernel(name))));
    findings.push(("images", ready(grub::Tools::state())));
    findings.push(("file systems", ready(ext4::Tools::state())));
    findings.push(("Debian disks", debian()));
    findings.push(("ssh", ready(ssh::Client::state())));
    findings.push(("packages", packages()));
    findings.push(("memory", memory()));
    findings.push(("cache", cache_folder()));
    let mut lacking = Vec::new();
    for (name, finding) in findings {
        let (mark, text) = match finding {
            Good(text) => ("ok   ", text),
            Later(text) => ("later", text),
            Bad(text) => {
                lacking.push(name);
                ("LACKS", text)
            }
        };
        println!("{mark} {name}: {text}");
    }
    if !lacking.is_empty() {
        bail!("this machine lacks: {}", lacking.join(", "));
    }
    Ok(())
}

fn compiler(sh: &Shell) -> Finding {
    match cmd!(sh, "rustc --version").quiet().ignore_stderr().read() {
        Ok(version) => Good(version),
        Err(_) => Bad("the toolchain of rust-toolchain.toml does not start".into()),
    }
}

fn component(sh: &Shell, tool: &str) -> Finding {
    match cmd!(sh, "cargo {tool} --version").quiet().ignore_stderr().read() {
        Ok(version) => Good(version),
        Err(_) => Bad(format!("`cargo {tool}` does not start; `cargo xtask check` needs it")),
    }
}

/// A state that says itself whether something would be fetched.
fn ready(state: Result<(bool, String)>) -> Finding {
    match state {
        Ok((true, text)) => Good(text),
        Ok((false, text)) => Later(text),
        Err(error) => Bad(format!("{error:#}")),
    }
}

fn processor() -> Finding {
    Good(match qemu::accelerator() {
        ("kvm", _) => "guests run on the processor (KVM)".into(),
        _ => "no usable KVM: guests are emulated (TCG), which is all that is needed".into(),
    })
}

fn kernel(name: &str) -> Finding {
    match kernels::is_cached(name) {
        Ok(true) => Good(format!("stock {name} in the cache")),
        Ok(false) => Later(format!("stock {name} would be fetched from the distribution (70 MB)")),
        Err(error) => Bad(format!("{error:#}")),
    }
}

/// Who makes the disks of `cargo xtask image debian`.
fn debian() -> Finding {
    match User::find() {
        Ok(user) => Good(format!("made as {}", user.name())),
        Err(why) => Later(format!("none can be made: {why:#}")),
    }
}

/// The tools that fetch what is missing; whoever names kernel and QEMU by hand needs none of them.
fn packages() -> Finding {
    let tools = ["/usr/bin/apt-get", "/usr/lib/apt/apt-helper", "/usr/bin/dpkg-deb"];
    match tools.iter().find(|tool| !Path::new(tool).is_file()) {
        None => Good("apt is here to fetch from the distribution, without root".into()),
        Some(tool) => Later(format!("no {tool}: name QEMU with --qemu, kernels with --kernel, and set RUST_SRC_PATH")),
    }
}

fn memory() -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    match total {
        Some(kib @ MEMORY..) => Good(format!("{} MiB", kib >> 10)),
        Some(kib) => Bad(format!("{} MiB, and {} are needed", kib >> 10, MEMORY >> 10)),
        None => Later("unknown".into()),
    }
}

fn cache_folder() -> Finding {
    match cache::dir() {
        Ok(dir) => Good(format!("{}, {} MiB", dir.display(), cache::size().unwrap_or_default() >> 20)),
        Err(error) => Bad(format!("{error:#}")),
    }
}
