//! The first program of a container's guest, once the script of its initramfs has loaded the drivers: it lays the container's
//! files out, starts the process, hands signals on, and tells the host how the process ended.
//!
//! ```text
//! /dev/xvda  the container's files, read-only -> /lower
//! memory     what the process writes          -> /written     overlayfs of both -> /container
//! /dev/xvdb  the process, and its end
//! ```

#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use container_init::{End, Process};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use nix::sys::termios::tcdrain;
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Gid, Uid, chdir, chown, chroot, setgid, setgroups, sethostname, setsid, setuid};
use std::env;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

const FILES: &str = "/dev/xvda";
const EXCHANGE: &str = "/dev/xvdb";
const TERMINAL: &str = "/dev/hvc0";
const ROOT: &str = "/container";
/// What the script of DHCP writes when there is an address.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// There if the guest is to be made again when the process has ended.
const REBOOT: &str = "/run/reboot";
/// How long a process may take to end when it was asked to.
const GRACE: Duration = Duration::from_secs(10);
/// How long the process waits for an address.
const ADDRESS: Duration = Duration::from_secs(20);
/// The statuses of a program that cannot be carried out, and of one that is missing, as shells have them.
const CANNOT: u8 = 126;
const MISSING: u8 = 127;

fn main() -> ExitCode {
    if env::args().nth(1).is_some() {
        return start();
    }
    // The first program must not end, so everything that can fail is below.
    let end = serve().unwrap_or_else(|why| End::Failed(format!("{why:#}")));
    if let Err(why) = tell(&end) {
        eprintln!("container-init: the host cannot be told of {end:?}: {why:#}");
    }
    if let Ok(terminal) = File::open(TERMINAL) {
        let _ = tcdrain(terminal);
    }
    let again = Path::new(REBOOT).exists();
    let Err(errno) = reboot(if again { RebootMode::RB_AUTOBOOT } else { RebootMode::RB_POWER_OFF });
    eprintln!("container-init: {errno}");
    ExitCode::FAILURE
}

/// Runs the process, and returns how it ended.
fn serve() -> Result<End> {
    let asked = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    asked.thread_block()?;
    let process = read()?;
    // An earlier life of the guest may have told its end.
    write(&vec![0; container_init::END_BYTES])?;
    lay_out(&process).context("the container's files")?;
    set_names(&process).context("the container's names")?;
    chown(TERMINAL, Some(Uid::from_raw(process.uid)), None)?;
    let child = Command::new("/proc/self/exe").arg("start").spawn().context("no process")?.id();
    let signal = process.stop_signal;
    thread::spawn(move || {
        while asked.wait().is_ok() {
            kill(signal, child);
            thread::spawn(move || {
                thread::sleep(GRACE);
                kill(9, child);
            });
        }
    });
    loop {
        let low = |number: i32| u8::try_from(number & 0xff).unwrap_or_default();
        let (pid, end) = match wait() {
            Ok(WaitStatus::Exited(pid, status)) => (pid, End::Exited(low(status))),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, End::Killed(low(signal as i32))),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(errno) => bail!("no end of the process: {errno}"),
        };
        if u32::try_from(pid.as_raw()) == Ok(child) {
            return Ok(end);
        }
    }
}

/// Sends a signal, which may be one that has no name.
fn kill(signal: u8, child: u32) {
    // The main thread takes the end of the program. If it cannot be started, the process goes on.
    let _ = Command::new("/bin/busybox").args(["kill", &format!("-{signal}"), &child.to_string()]).spawn();
}

fn read() -> Result<Process> {
    let disk = fs::read(EXCHANGE).with_context(|| EXCHANGE.to_owned())?;
    Process::of_disk(&disk).with_context(|| EXCHANGE.to_owned())
}

fn tell(end: &End) -> Result<()> {
    write(&end.to_disk())
}

fn write(bytes: &[u8]) -> Result<()> {
    let mut disk = OpenOptions::new().write(true).open(EXCHANGE)?;
    disk.write_all(bytes)?;
    Ok(disk.sync_all()?)
}

/// Mounts the container's files and what every process expects beside them.
fn lay_out(process: &Process) -> Result<()> {
    let no = MsFlags::empty();
    let at = |source: &str, target: &str, kind: &str, flags: MsFlags, options: &str| {
        fs::create_dir_all(target).with_context(|| target.to_owned())?;
        mount(Some(source), target, Some(kind), flags, Some(options)).with_context(|| format!("{kind} at {target}"))
    };
    at(FILES, "/lower", "ext4", MsFlags::MS_RDONLY, "")?;
    let size = process.written_mib.map(|mib| format!("size={mib}m")).unwrap_or_default();
    at("written", "/written", "tmpfs", no, &size)?;
    for folder in ["/written/upper", "/written/work"] {
        fs::create_dir(folder)?;
    }
    // The topmost folder is the image's.
    let above = fs::metadata("/lower")?;
    fs::set_permissions("/written/upper", above.permissions())?;
    at("container", ROOT, "overlay", no, "lowerdir=/lower,upperdir=/written/upper,workdir=/written/work")?;
    // The file system came with it, and the image did not. One that is not empty is the image's.
    let _ = fs::remove_dir(format!("{ROOT}/lost+found"));
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let inside = |path: &str| format!("{ROOT}{path}");
    at("proc", &inside("/proc"), "proc", quiet | MsFlags::MS_NODEV, "")?;
    at("sysfs", &inside("/sys"), "sysfs", quiet | MsFlags::MS_NODEV, "")?;
    at("dev", &inside("/dev"), "devtmpfs", quiet, "")?;
    at("devpts", &inside("/dev/pts"), "devpts", quiet, "gid=5,mode=0620,ptmxmode=0666")?;
    at("shm", &inside("/dev/shm"), "tmpfs", quiet | MsFlags::MS_NODEV, "mode=1777")?;
    for (name, target) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        // They may be there.
        let _ = symlink(format!("/proc/self/{target}"), inside(&format!("/dev/{name}")));
    }
    let tmp = inside("/tmp");
    if fs::symlink_metadata(&tmp).is_err() {
        fs::create_dir(&tmp)?;
        fs::set_permissions(&tmp, Permissions::from_mode(0o1777))?;
    }
    Ok(())
}

/// Sets the guest's name, and writes the files that say how names lead to addresses.
fn set_names(process: &Process) -> Result<()> {
    let name = &process.hostname;
    sethostname(name)?;
    let etc = format!("{ROOT}/etc");
    fs::create_dir_all(&etc)?;
    let replace = |name: &str, text: &str| -> Result<String> {
        let file = format!("{etc}/{name}");
        // A link would lead to where the guest's other files are.
        let _ = fs::remove_file(&file);
        fs::write(&file, text)?;
        Ok(file)
    };
    replace("hostname", &format!("{name}\n"))?;
    replace("hosts", &format!("127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 {name}\n"))?;
    let has_device = fs::read_dir("/sys/class/net")?.flatten().any(|device| device.file_name() != "lo");
    if has_device {
        let tenth = Duration::from_millis(100);
        let known = || fs::metadata(RESOLV_CONF).is_ok_and(|file| file.len() > 0);
        let mut left = ADDRESS;
        while !known() && !left.is_zero() {
            thread::sleep(tenth);
            left = left.saturating_sub(tenth);
        }
        if known() {
            // The client of DHCP writes the file again, and the process reads what it wrote.
            let file = replace("resolv.conf", "")?;
            mount(Some(RESOLV_CONF), file.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        } else {
            eprintln!("container-init: no address after {} s", ADDRESS.as_secs());
        }
    }
    Ok(())
}

/// Becomes the process. Returns only if that fails.
fn start() -> ExitCode {
    match become_process() {
        Ok((program, why)) => {
            eprintln!("container-init: cannot start {program}: {why}");
            ExitCode::from(if why.kind() == ErrorKind::NotFound { MISSING } else { CANNOT })
        }
        Err(why) => {
            eprintln!("container-init: {why:#}");
            ExitCode::from(CANNOT)
        }
    }
}

/// Becomes the process. Returns its program, and why that cannot be started.
fn become_process() -> Result<(String, std::io::Error)> {
    let process = read()?;
    // The terminal that the first process of a session opens becomes the session's.
    setsid()?;
    let terminal = OpenOptions::new().read(true).write(true).open(TERMINAL).context(TERMINAL)?;
    chroot(ROOT)?;
    chdir("/")?;
    fs::create_dir_all(&process.cwd)
        .and_then(|()| env::set_current_dir(&process.cwd))
        .with_context(|| format!("the working directory {}", process.cwd))?;
    umask(Mode::from_bits_truncate(0o022));
    let groups: Vec<Gid> = process.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    setgroups(&groups)?;
    setgid(Gid::from_raw(process.gid))?;
    setuid(Uid::from_raw(process.uid))?;
    SigSet::all().thread_unblock()?;
    let (program, arguments) = process.args.split_first().context("no program")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    command.envs(process.env.iter().filter_map(|line| line.split_once('=')));
    command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
    Ok((program.clone(), command.exec()))
}
