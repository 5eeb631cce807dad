//! Stories of `cargo xtask run`: commands from outside, files that describe guests, exit statuses.

use crate::stories::{BOOT, SHELL, SOON, answers, image, start};
use anyhow::{Context, Result, ensure};
use boot::answers::{done, names, number, refused};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use xtask::bundle::Bundle;
use xtask::kernels;

/// The exit status of `cargo xtask run` with these arguments, and what it printed.
fn run(arguments: &[&str]) -> Result<(i32, String, String)> {
    xtask(&[&["run", "--profile", boot::PROFILE, "--timeout", "200"], arguments].concat())
}

/// `cargo xtask` with these arguments, where nobody types.
fn xtask_command(arguments: &[&str]) -> Result<Command> {
    let folder = boot::images()?;
    let target = folder.ancestors().nth(2).context("no target folder")?;
    let mut command = Command::new("cargo");
    command.current_dir(xtask::root()).env("CARGO_TARGET_DIR", target).stdin(Stdio::null());
    command.args(["run", "--quiet", "--package", "xtask", "--"]).args(arguments);
    Ok(command)
}

/// The exit status of `cargo xtask` with these arguments, and what it printed.
pub(crate) fn xtask(arguments: &[&str]) -> Result<(i32, String, String)> {
    xtask_with(arguments, &[])
}

/// The same with variables in its environment.
pub(crate) fn xtask_with(arguments: &[&str], variables: &[(&str, &Path)]) -> Result<(i32, String, String)> {
    outcome(xtask_command(arguments)?.envs(variables.iter().copied()))
}

/// The same by another program, which is given its words, and behind them those that start it.
pub(crate) fn xtask_by(program: &mut Command, arguments: &[&str]) -> Result<(i32, String, String)> {
    let command = xtask_command(arguments)?;
    let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    program.current_dir(xtask::root()).envs(variables).stdin(Stdio::null());
    outcome(program.arg(command.get_program()).args(command.get_args()))
}

fn outcome(command: &mut Command) -> Result<(i32, String, String)> {
    let output = command.output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code().context("no status")?, text(output.stdout), text(output.stderr)))
}

fn json(text: &str) -> Result<Vec<Value>> {
    let parse = |line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}"));
    text.lines().map(parse).collect()
}

/// Commands given from outside: nothing but JSON on standard output, a status, and an end when the guest has obeyed.
pub(crate) fn commands_from_outside_answer_in_json() -> Result<()> {
    let kernel = image("hello")?;
    let hello = kernel.to_string_lossy();
    let commands = "list -j; info -j; uptime -j; rename linux shop -j; domid shop -j; shutdown -w shop -j; list -j";
    let (status, out, err) = run(&["--memory", "128M", "--exec", commands])?;
    ensure!(status == 0, "{status} {out}\n{err}");
    let answers = json(&out)?;
    ensure!(answers.len() == 7, "{out}");
    ensure!(names(&answers[0]) == ["dom0", "linux"] && answers[0][1]["memory_mib"] == 128, "{out}");
    let field = |name: &str| number(&answers[1], name);
    let (total, free) = (field("total_mib")?, field("free_mib")?);
    let (hypervisor, own, bundle) = (field("hypervisor_kib")?, field("dom0_kib")?, field("bundle_kib")?);
    // Every page is somebody's; each of the numbers may have been rounded by less than a MiB.
    let sum = free + 128 + ((hypervisor + own + bundle) >> 10);
    ensure!(hypervisor > 0 && own > 0 && (total - 4..=total).contains(&sum), "{sum} MiB in all\n{out}");
    ensure!((800..=1024).contains(&total) && free > 0 && free + 128 < total, "{out}");
    ensure!(answers[1]["domains"] == 2 && answers[1]["cpus"].as_u64().is_some_and(|cpus| cpus >= 1), "{out}");
    ensure!(answers[2]["seconds"].is_u64() && answers[3] == done("rename", "shop"), "{out}");
    ensure!(answers[4] == json!({ "name": "shop", "domid": 8 }), "{out}");
    ensure!(answers[5] == done("shutdown", "shop") && names(&answers[6]) == ["dom0"], "{out}");
    ensure!(err.contains("guest shop (domain 8) powered off"), "{err}");
    ensure!(!err.contains("not used"), "this machine has no devices to speak of\n{err}");

    let (status, out, err) = run(&["--kernel", &hello, "--exec", "pause nobody -j; list -j"])?;
    ensure!(status == 15, "a refused command ends with {status}\n{err}");
    let answers = json(&out)?;
    ensure!(answers == [refused("there is no guest nobody")], "{out}");
    let (status, out, err) = run(&["--exec", "list; dance"])?;
    ensure!(status == 1 && out.is_empty() && err.contains("--exec: dance: unknown command"), "{out}\n{err}");
    Ok(())
}

/// dom0 finds the disks of the machine, names the devices that it has no driver for, and guests are made all the same.
pub(crate) fn disks_of_the_machine_are_found() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (small, large) = (folder.path().join("small.img"), folder.path().join("large.img"));
    File::create(&small)?.set_len(8 << 20)?;
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&large).arg("3G").status();
    if !made.is_ok_and(|status| status.success()) {
        File::create(&large)?.set_len(3 << 30)?;
    }
    let large = large.to_string_lossy();
    let read_only = format!("{},ro", small.display());
    let mut words = vec!["--disk", &*read_only, "--disk", &large];
    words.extend(["--qemu-arg=-blockdev", "--qemu-arg=driver=null-co,node-name=old,size=1048576"]);
    words.extend(["--qemu-arg=-device", "--qemu-arg=virtio-blk-pci,drive=old,disable-modern=on"]);
    words.extend(["--exec", "disks -j; list -j; shutdown -w linux -j; disks"]);
    let (status, out, err) = run(&words)?;
    ensure!(status == 0, "{status} {out}\n{err}");
    let answers = json(&out.lines().take(3).collect::<Vec<_>>().join("\n"))?;
    let listed = answers[0].as_array().context("no list")?;
    let disk = |row: &Value| (row["serial"].clone(), row["bytes"].clone(), row["read_only"].clone());
    let wanted = [("tenon0", 8u64 << 20, true), ("tenon1", 3 << 30, false)];
    let wanted = wanted.map(|(serial, bytes, read_only)| (json!(serial), json!(bytes), json!(read_only)));
    ensure!(listed.iter().map(disk).eq(wanted), "{out}\n{err}");
    ensure!(listed.iter().all(|row| row["block_bytes"] == 512), "{out}");
    ensure!(names(&answers[1]) == ["dom0", "linux"] && answers[2] == done("shutdown", "linux"), "{out}");
    ensure!(out.contains("tenon1                    3 GiB   512 rw     virtio disk at 00:"), "{out}");
    let legacy =
        |line: &&str| line.starts_with("not used: ") && line.contains("(1af4:1001, ") && line.contains("legacy");
    ensure!(err.lines().filter(legacy).count() == 1 && err.matches("not used").count() == 1, "{err}");
    ensure!(err.contains("guest linux (domain 8) powered off"), "{err}");

    let missing = folder.path().join("none.img").to_string_lossy().into_owned();
    for (disk, why) in [(&missing, "no such file"), (&format!("{large},cache=unsafe"), "cache=unsafe")] {
        let (status, out, err) = run(&["--disk", disk])?;
        ensure!(status == 1 && out.is_empty() && err.starts_with(&format!("error: --disk: {disk}: ")), "{out}\n{err}");
        ensure!(err.contains(why), "{err}");
    }
    Ok(())
}

/// dom0 starts the network devices of the machine and says their addresses. One that it cannot use is named.
pub(crate) fn network_devices_of_the_machine_are_found() -> Result<()> {
    let mut words = vec!["--qemu-arg=-netdev", "--qemu-arg=user,id=first", "--qemu-arg=-netdev"];
    words.extend(["--qemu-arg=user,id=second", "--qemu-arg=-netdev", "--qemu-arg=user,id=third"]);
    // The empty ROM file: QEMU is fetched without its ROMs.
    for device in [
        "--qemu-arg=virtio-net-pci,netdev=first,mac=52:54:00:12:34:56,romfile=",
        "--qemu-arg=virtio-net-pci,netdev=second,mac=52:54:00:12:34:57,host_mtu=9000,romfile=",
        "--qemu-arg=virtio-net-pci,netdev=third,mac=52:54:00:12:34:58,disable-modern=on,romfile=",
    ] {
        words.extend(["--qemu-arg=-device", device]);
    }
    // The list of disks waits until all devices were started.
    words.extend(["--exec", "disks -j; list -j"]);
    let (status, out, err) = run(&words)?;
    ensure!(status == 0, "{status} {out}\n{err}");
    let started =
        |what: &str| err.lines().filter(|line| line.starts_with("network device ") && line.ends_with(what)).count();
    ensure!(started(": 52:54:00:12:34:56, MTU 1500") == 1 && started(": 52:54:00:12:34:57, MTU 9000") == 1, "{err}");
    ensure!(started("") == 2 && err.matches("not used").count() == 1, "{err}");
    let legacy =
        |line: &str| line.starts_with("not used: ") && line.contains("(1af4:1000, ") && line.contains("legacy");
    ensure!(err.lines().any(legacy), "{err}");
    Ok(())
}

/// Two guests described by files run; what is wrong with a file is told, with its line, before anything starts.
pub(crate) fn guest_files_run_and_are_refused_with_their_lines() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let sh = boot::shell()?;
    let link = |name: &str, to: &Path| std::os::unix::fs::symlink(to, folder.path().join(name));
    link("vmlinux", &kernels::stock(&sh, kernels::DEFAULT)?.vmlinux)?;
    link("initrd", &kernels::ramdisk(&sh)?)?;
    let file = |name: &str, more: &str| -> Result<String> {
        let path = folder.path().join(format!("{name}.toml"));
        let common = "kernel = 'vmlinux'\nramdisk = 'initrd'\nextra = 'console=hvc0'\nmemory = 128\n";
        fs::write(&path, format!("name = '{name}'\n{common}{more}"))?;
        Ok(path.to_string_lossy().into_owned())
    };
    for name in ["data.img", "both.img", "base.img"] {
        fs::write(folder.path().join(name), [0; 4096])?;
    }
    let web = file("web", "vcpus = 2\ndisk = ['data.img,,xvda', 'both.img,,xvdb,r']\n")?;
    let db = "maxmem = 256\non_reboot = 'destroy'\ndisk = ['bundle:base.img,,xvda', './both.img,,xvdb,r']\n";
    let db = file("db", db)?;
    let commands = "list -j; shutdown -w web -j; shutdown -w db -j; list -j; disks -j";
    let (status, out, err) = run(&[&web, &db, "--exec", commands])?;
    ensure!(status == 0, "{status} {out}\n{err}");
    let answers = json(&out)?;
    ensure!(answers.len() == 5 && names(&answers[0]) == ["dom0", "web", "db"], "{out}");
    ensure!(answers[1..3] == ["web", "db"].map(|name| done("shutdown", name)), "{out}");
    ensure!(names(&answers[3]) == ["dom0"], "{out}");
    ensure!(err.contains("guest web (domain 8) powered off"), "{err}");
    // The two files are disks of the machine, and only one of them can be written.
    let disks = answers[4].as_array().into_iter().flatten();
    let disks: Vec<_> = disks.map(|disk| (disk["serial"].as_str().unwrap_or_default(), &disk["read_only"])).collect();
    let [data, both] = disks[..] else { anyhow::bail!("{out}") };
    ensure!(data.0.starts_with("data-") && data.1 == false, "{out}");
    ensure!(both.0.starts_with("both-") && both.1 == true, "{out}");

    let refused = |arguments: &[&str], why: &str| -> Result<()> {
        let (status, out, err) = run(arguments)?;
        ensure!(status == 1 && out.is_empty() && err.contains(why), "not refused with {why:?}:\n{out}\n{err}");
        ensure!(err.lines().filter(|line| line.starts_with("error: ")).count() == 1, "not one line:\n{err}");
        Ok(())
    };
    refused(&[&file("disky", "disk = ['x,,xvda']\n")?], "disky.toml:6: disk: ")?;
    // dom0 refuses a second writer.
    let second = file("second", "disk = ['data.img,,xvda']\n")?;
    let why = "is in use: web writes it";
    let (status, out, err) = run(&[&web, &second, "--exec", "destroy web"])?;
    ensure!(status == 14 && err.contains(why), "{status} {out}\n{err}");
    refused(&[&file("viffy", "vif = ['x']\n")?], "viffy.toml:6: vif: vif 1: `x` is not KEY=VALUE")?;
    let both = file("both", "vif = ['', 'bridge=uplink']\n")?;
    refused(&[&both], "guests have vifs on nat and on uplink, which cannot share the machine's network device")?;
    refused(&[&web, "--forward", "2222:nobody:22"], "--forward tcp:2222:nobody:22: there is no guest nobody")?;
    refused(&[&web, "--forward", "2222:web:22"], "--forward tcp:2222:web:22: web has no vif on the network nat")?;
    refused(&[&file("odd", "cpu = 1\n")?], "odd.toml:6: cpu: unknown field")?;
    refused(&[&web, &web], "web.toml:1: name: \"web\" is the guest of")?;
    refused(&[&web, &db, "--machine-memory", "320M"], "db.toml:5: memory: 128 MiB for db, but only")
}

/// How a guest ends is the status of the run; what could not be, too.
pub(crate) fn the_exit_status_says_how_guests_ended() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kernel = image("crash")?;
    let (crash, spin) = (kernel.to_string_lossy(), image("spin")?.to_string_lossy().into_owned());
    let file = |name: &str, how: &str, more: &str| -> Result<String> {
        let path = folder.path().join(format!("{name}.toml"));
        let text = format!("name = '{name}'\nmemory = 16\nkernel = '{crash}'\nextra = 'how={how}'\n{more}");
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let ends = |arguments: &[&str], wanted: i32, why: &str| -> Result<()> {
        let (status, out, err) = run(arguments)?;
        ensure!(status == wanted && err.contains(why), "{arguments:?}: {status} instead of {wanted}\n{out}\n{err}");
        Ok(())
    };
    let (off, good) = (file("off", "poweroff", "")?, "guest off (domain 8) powered off");
    let (out, err) = match run(&[&off])? {
        (0, out, err) => (out, err),
        (status, out, err) => anyhow::bail!("{status} after a power-off\n{out}\n{err}"),
    };
    ensure!(out.contains(good), "{out}\n{err}");
    ends(&[&file("ud2", "ud2", "")?, &off], 10, "error: a guest crashed")?;
    ends(&[&file("dog", "watchdog", "on_watchdog = 'destroy'\n")?], 11, "error: a guest missed its watchdog")?;
    ends(&[&file("again", "reboot", "on_reboot = 'destroy'\n")?], 12, "error: a guest rebooted")?;
    ends(
        &[&file("asleep", "suspend", "on_poweroff = 'destroy'\n")?],
        13,
        "error: a guest ended, but did not power off",
    )?;
    ends(&["--kernel", &crash, "--memory", "1M"], 1, "error: --memory: too little memory: needs ")?;
    // What dom0 alone finds out: there are vcpus for 15 such guests.
    let many: Vec<String> = (0..16).map(|n| file(&format!("many{n}"), "log", "vcpus = 32\n")).collect::<Result<_>>()?;
    let mut words: Vec<&str> = many.iter().map(String::as_str).collect();
    words.extend(["--exec", "quit"]);
    ends(&words, 14, "error: guest many15: creating the domain: ")?;
    ends(&["--first", "crash", "--extra", "how=shutdown"], 10, "error: the first domain crashed")?;
    ends(&["--kernel", &crash, "--ramdisk", "none", "--extra-only", "how=poweroff", "--name", "shop"], 0, "")?;
    let (status, _, err) = xtask(&["run", "--profile", boot::PROFILE, "--kernel", &spin, "--timeout", "5"])?;
    ensure!(status == 124 && err.contains("no end after 5 s"), "{status} after a timeout\n{err}");
    ends(&["--kernel", &spin, "--", "frobnicate=1"], 21, "error: the hypervisor panicked, or had nothing to start")?;
    // More than any process can address.
    ends(&["--kernel", &spin, "--machine-memory", "1000000G"], 22, "error: QEMU could not run the machine")?;
    ends(&["--kernel", &spin, "--cpu", "no-such-model"], 22, "error: QEMU could not run the machine")?;
    ends(&["--first", "hello", "--cpu", "Nehalem", "--qemu-arg=-name", "--qemu-arg=other"], 0, "")?;
    ends(&["--memory", "much"], 2, "--memory")?;
    ends(&["--memory", "2000M"], 1, "error: --memory: 2000 MiB for linux, but only")
}

/// A stock kernel as the first domain has the machine's console: it shows its log, and its shell takes what is typed.
pub(crate) fn a_stock_kernel_alone_has_a_console() -> Result<()> {
    let stock = kernels::stock(&boot::shell()?, kernels::DEFAULT)?.vmlinux;
    let ramdisk = kernels::ramdisk(&boot::shell()?)?;
    let bundle = Bundle::first(&stock, Some(&ramdisk), "console=hvc0 acpi=off").first_memory(256);
    let mut machine = start("a_stock_kernel_alone_has_a_console", bundle)?;
    machine.expect("Linux version 6.1", BOOT)?;
    machine.expect("tenon-guest: init reached", BOOT)?;
    machine.expect(SHELL, SOON)?;
    answers(&mut machine)?;
    machine.expect(SHELL, SOON)?;
    machine.type_line("poweroff -f")?;
    machine.finish()?.require_success()?;
    // A later one would look for the firmware's tables in memory that nobody may map: it shows its log.
    let (status, out, err) = run(&["--first", "6.12", "--extra", "tenon.oneshot"])?;
    let shown = ["Linux version 6.12", "Run /init as init process", "tenon-guest: init reached"];
    ensure!(status == 0 && shown.iter().all(|line| out.contains(line)), "{status} {out}\n{err}");
    Ok(())
}

/// A run that a test looks at from outside. It does not outlive this, nor does its QEMU, which a run takes along when
/// it is asked to end, and leaves behind when it is killed.
struct Run(Child);

impl Run {
    /// Its process: Cargo becomes the program it runs.
    fn process(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.0.id())?))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let (Ok(None), Ok(process)) = (self.0.try_wait(), self.process()) {
            // Both fail only if it has ended in between.
            let _ = kill(process, Signal::SIGTERM);
            let _ = self.0.wait();
        }
    }
}

/// The process of QEMU that the process `parent` has started, if it has.
fn qemu_of(parent: Pid) -> Result<Option<Pid>> {
    let mut children = String::new();
    for task in fs::read_dir(format!("/proc/{parent}/task"))?.flatten() {
        // A thread may have ended in the meantime.
        children += &fs::read_to_string(task.path().join("children")).unwrap_or_default();
    }
    for child in children.split_whitespace() {
        if fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| name.starts_with("qemu-system")) {
            return Ok(Some(Pid::from_raw(child.parse()?)));
        }
    }
    Ok(None)
}

/// Who is sent a signal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whom {
    Xtask,
    Qemu,
}

/// Starts a run of a guest that never ends, sends a signal when the guest is up, and gives status and standard error
/// of the run after its end. QEMU must be gone by then.
fn signalled(whom: Whom, signal: Signal) -> Result<(i32, String)> {
    let spin = image("spin")?.to_string_lossy().into_owned();
    let arguments = ["run", "--profile", boot::PROFILE, "--timeout", "60", "--kernel", &spin];
    let mut command = xtask_command(&arguments)?;
    let mut run = Run(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    let mut errors = run.0.stderr.take().context("no standard error")?;
    let errors = thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).map(|_| text)
    });
    let xtask = run.process()?;
    let mut output = BufReader::new(run.0.stdout.take().context("no standard output")?).lines();
    output
        .find(|line| line.as_ref().map_or(true, |line| line.contains("spin: from here on")))
        .context("no guest")??;
    let qemu = qemu_of(xtask)?.context("the run has no QEMU")?;
    kill(if whom == Whom::Qemu { qemu } else { xtask }, signal)?;
    // The output ends with the last of those that can write to it.
    output.try_for_each(|line| line.map(drop))?;
    let status = run.0.wait()?.code().context("the run was killed by the signal")?;
    ensure!(kill(qemu, None).is_err(), "QEMU outlives the run");
    let errors = errors.join().ok().context("the reader of standard error panicked")??;
    Ok((status, errors))
}

/// A run that is interrupted puts its machine away and says so; one whose QEMU is killed says that.
pub(crate) fn the_exit_status_says_who_was_killed() -> Result<()> {
    for (whom, signal, wanted, why) in [
        (Whom::Xtask, Signal::SIGINT, 130, "error: interrupted"),
        (Whom::Xtask, Signal::SIGTERM, 130, "error: interrupted"),
        (Whom::Qemu, Signal::SIGKILL, 22, "error: QEMU was killed"),
    ] {
        let (status, err) = signalled(whom, signal)?;
        ensure!(status == wanted && err.contains(why), "{status} instead of {wanted} after {signal}\n{err}");
    }
    Ok(())
}

/// Firmware reserves memory for each device after it has placed the boot bundle: the end of the bundle may lie where the memory
/// map no longer calls it RAM. Ring 0 read it there, and had no mapping of it.
pub(crate) fn a_machine_with_many_devices_boots() -> Result<()> {
    let mut args: Vec<String> = ["run", "--profile", boot::PROFILE, "--exec", "list -j"].map(str::to_owned).into();
    for disk in 0..6 {
        let node = format!("driver=null-co,node-name=null{disk},size=1048576");
        let device = format!("virtio-blk-pci,drive=null{disk}");
        args.extend(
            [("-blockdev", node), ("-device", device)]
                .into_iter()
                .flat_map(|(option, value)| [format!("--qemu-arg={option}"), format!("--qemu-arg={value}")]),
        );
    }
    let (status, out, err) = xtask(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(status == 0 && out.contains("\"name\":\"dom0\""), "{status:?}\n{out}\n{err}");
    Ok(())
}
