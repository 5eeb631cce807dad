//! The machines that are compared: one emulated machine, and what it is started with.

mod machine;
mod systems;

use machine::Machine;
pub(super) use machine::Run;
pub(super) use systems::System;

use super::Options;
use super::host::Server;
use anyhow::{Context, Error, Result, bail, ensure};
use microbench::{BEHIND_GATEWAY, DONE, MAX_DRIVERS, REACHED, SCRIPTS, SETUP, VIRTIO_NET_DRIVERS, mode};
use object::{Object, ObjectSegment, SegmentFlags};
use std::ffi::{CStr, OsString};
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::NamedTempFile;
use toolstack::config::GuestConfig;
use toolstack::vif::VifConfig;
use xshell::{Shell, cmd};
use xtask::bundle::{Bundle, Guest};
use xtask::qemu::Qemu;
use xtask::xen::Xen;
use xtask::{build, built, initramfs, kernels, xen};

/// Memory of the machine in MiB.
const MACHINE: u32 = 1024;
/// Without SMAP and SMEP, and AMD-like, so that neither kernel nor hypervisor isolates page tables; without fast string
/// operations (with FSRM but without ERMS, Linux 6.1 does not boot), as TCG counts each byte of a copy; 48-bit addresses, as
/// all PV kernels have; no x2APIC, as QEMU 10.0 gives up ("Bad icount read") when Xen uses its timer by MSRs.
const CPU: &str = "max,-erms,-fsrm,-fzrm,-fsrs,-la57,-smap,-smep,-x2apic";
/// Words for every kernel. Addresses of programs are not random: where a stack or a map lies decides how many page tables a
/// process has, and so moved rows of fork and exec by up to a tenth from run to run.
const WORDS: &str = "panic=-1 norandmaps";

/// A virtio network device, which leads to QEMU's user network. Its ROM would boot from there, and not every QEMU has the file.
const USER_NETWORK: [&str; 4] = ["-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,romfile="];

/// The serial number of a machine's disk.
const SERIAL: &str = "bench";

/// The arguments of QEMU for the disk in the file `file`, with more options for its drive.
fn disk(file: &Path, more: &str) -> [String; 4] {
    [
        "-drive".to_owned(),
        format!("file={},format=raw,if=none,id=bench,cache=unsafe{more}", file.display()),
        "-device".to_owned(),
        format!("virtio-blk-pci,drive=bench,serial={SERIAL}"),
    ]
}

/// What a column of a table stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Column {
    /// The stock kernel alone on the machine
    Bare,
    /// The stock kernel as Xen's first domain
    Xen,
    /// The stock kernel as a guest of Tenon
    Tenon,
}

/// Everything that runs need.
#[derive(Clone)]
pub(super) struct Lab {
    qemu: Qemu,
    plugin: PathBuf,
    /// The folder of the images, release profile.
    images: PathBuf,
    kernel: kernels::Kernel,
    kernel_name: String,
    xen: Option<Xen>,
    /// An initramfs whose init is the benchmark program.
    ramdisk: Arc<NamedTempFile>,
    only: Vec<Column>,
    /// More words for the kernel's command line, each with a blank behind it.
    words: String,
    pub(super) profile: bool,
    pub(super) stays: bool,
    /// Whether the clock counts instructions; else it is the host's, and nothing is counted.
    counting: bool,
    logs: Option<PathBuf>,
    /// What is measured with what: name and version.
    pub(super) versions: Vec<(String, String)>,
    /// The day.
    pub(super) date: String,
}

/// How the clock of a machine goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    /// By a nanosecond an instruction. While no CPU has anything to do, it jumps to the next timer.
    Skips,
    /// By a nanosecond an instruction. While no CPU has anything to do, it goes as the host's. Otherwise each wait for a device
    /// would last until the next tick of the guest, whose handling would be counted: 12,000 instructions for a read of a disk.
    Passes,
    /// As the host's, and nothing is counted.
    IsHosts,
}

impl Clock {
    /// What tells a run by the host's clock from one that is counted, in names.
    const fn ending(self) -> &'static str {
        match self {
            Self::Skips | Self::Passes => "",
            Self::IsHosts => "-by-clock",
        }
    }
}

/// How long windows of TCP took by the host's clock: to the host, and from it.
pub(super) type Times = [Vec<Duration>; 2];

/// What is typed once something was printed.
pub(super) type Typed<'a> = (&'a str, &'a str);

/// Which form of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As distributed: compressed.
    BzImage,
    /// The ELF file inside.
    Elf,
}

impl Lab {
    /// Builds and fetches what is missing.
    pub(super) fn new(sh: &Shell, options: &Options) -> Result<Self> {
        let qemu = Qemu::find(sh, None)?;
        let images = build::images(sh, "release")?;
        cmd!(sh, "cargo build --quiet --release --package plugin").quiet().run()?;
        let plugin = build::target_dir(sh)?.join("release/libplugin.so");
        let kernel = kernels::named(sh, &options.kernel)?;
        let wanted = |column| options.only.is_empty() || options.only.contains(&column);
        let xen = wanted(Column::Xen).then(|| xen::hypervisor(sh)).transpose()?;
        let program = |name| {
            let file = build::image(&images, name)?;
            fs::read(&file).with_context(|| format!("cannot read {}", file.display()))
        };
        let (init, tiny) = (program("microbench")?, program("tiny")?);
        let mut files = vec![("init", &*init), ("bin/tiny", &*tiny)];
        let shell = match options.which {
            super::Which::Scripts => Some(fs::read(kernels::busybox(sh)?)?),
            _ => None,
        };
        let modules = [("xen_blkfront", microbench::DRIVER), ("xen_netfront", microbench::NET_DRIVER)];
        let driver = |(module, path): (&str, &'static CStr)| -> Result<_> {
            Ok((path.to_str()?.trim_start_matches('/'), fs::read(kernels::driver(sh, &options.kernel, module)?)?))
        };
        let drivers = match options.which {
            super::Which::Io => modules.into_iter().map(driver).collect::<Result<Vec<_>>>()?,
            _ => Vec::new(),
        };
        files.extend(drivers.iter().map(|(path, driver)| (*path, driver.as_slice())));
        let of_virtio_net = match options.which {
            super::Which::Io => of_virtio_net(sh, &options.kernel)?,
            _ => Vec::new(),
        };
        files.extend(of_virtio_net.iter().map(|(path, driver)| (path.as_str(), driver.as_slice())));
        if let Some(shell) = &shell {
            files.push(("bin/busybox", shell));
            for script in [SETUP].iter().chain(&SCRIPTS) {
                files.push((script.path.to_str()?.trim_start_matches('/'), script.text.as_bytes()));
            }
        }
        let mut ramdisk = NamedTempFile::new()?;
        ramdisk.write_all(&initramfs::of_programs(&files)?)?;
        let mut commit = cmd!(sh, "git describe --always").quiet().ignore_stderr().read().unwrap_or_default();
        // Results that were kept just before change nothing about what is measured.
        let clean = cmd!(sh, "git diff --quiet HEAD -- . :!tests/bench/results").quiet().ignore_stderr();
        if clean.run().is_err() {
            commit += "-dirty";
        }
        let rustc = cmd!(sh, "rustc --version").quiet().read()?;
        let mut versions = vec![
            ("Tenon".to_owned(), format!("{} {commit}", env!("CARGO_PKG_VERSION"))),
            ("QEMU".to_owned(), qemu.version_text()?),
            ("kernel".to_owned(), kernel.version()?),
            ("rustc".to_owned(), rustc.trim_start_matches("rustc ").to_owned()),
        ];
        versions.extend(xen.iter().map(|xen| ("Xen".to_owned(), xen.version.clone())));
        let date = cmd!(sh, "date -u +%F").quiet().read()?;
        if let Some(folder) = &options.logs {
            fs::create_dir_all(folder)?;
        }
        Ok(Self {
            qemu,
            plugin,
            images,
            kernel,
            kernel_name: options.kernel.clone(),
            xen,
            ramdisk: Arc::new(ramdisk),
            only: options.only.clone(),
            words: String::new(),
            profile: options.profile,
            stays: options.stays,
            counting: options.which != super::Which::Wall,
            logs: options.logs.clone(),
            versions,
            date,
        })
    }

    /// Whether the column is wanted.
    pub(super) fn wants(&self, column: Column) -> bool {
        self.only.is_empty() || self.only.contains(&column)
    }

    /// Whether all columns are wanted.
    pub(super) fn wants_all(&self) -> bool {
        self.only.is_empty()
    }

    /// Whether the kernel is the one that is measured where none is named.
    pub(super) fn is_default_kernel(&self) -> bool {
        self.is(kernels::DEFAULT)
    }

    /// Whether the kernel has this name.
    pub(super) fn is(&self, kernel: &str) -> bool {
        self.kernel_name == kernel
    }

    /// The same with another kernel. The initramfs stays: drivers in it are those of the first kernel.
    pub(super) fn with_kernel(&self, sh: &Shell, name: &str) -> Result<Self> {
        Ok(Self { kernel: kernels::named(sh, name)?, kernel_name: name.to_owned(), ..self.clone() })
    }

    /// The same with these words on the kernel's command line.
    pub(super) fn with_words(&self, words: impl Into<String>) -> Self {
        Self { words: words.into(), ..self.clone() }
    }

    /// The same with all parts of our patches on, if the kernel has them: on Xen they are off unless that is said.
    pub(super) fn with_parts(&self, column: Column) -> Self {
        let say = column == Column::Xen && self.compared_with().is_some();
        if say { self.with_words("tenon=all ") } else { self.clone() }
    }

    /// The version of the kernel.
    pub(super) fn kernel_version(&self) -> Result<String> {
        self.kernel.version()
    }

    /// The kernel without patches that this kernel, which has them, is compared with; `None` if this kernel has none.
    pub(super) fn compared_with(&self) -> Option<String> {
        built::unpatched(&self.kernel_name)
    }

    /// The name of a bench with this kernel.
    pub(super) fn name(&self, bench: &str) -> String {
        if self.is_default_kernel() { bench.to_owned() } else { format!("{bench}-{}", self.kernel_name) }
    }

    /// The file of an image.
    pub(super) fn image(&self, name: &str) -> Result<PathBuf> {
        build::image(&self.images, name)
    }

    /// What a run is called in messages and in the names of logs.
    fn name_of_run(&self, place: &str, what: &str) -> String {
        let kernel = if self.is_default_kernel() { String::new() } else { format!("{}-", self.kernel_name) };
        format!("{place}-{kernel}{what}").replace(' ', "-")
    }

    /// The stock kernel alone.
    pub(super) fn bare(&self, mode: &str) -> Result<Run> {
        self.bare_with("", mode)
    }

    /// The stock kernel alone with so many MiB of the machine's memory.
    pub(super) fn bare_in(&self, mode: &str, memory: u32) -> Result<Run> {
        self.bare_with(&format!("mem={memory}M "), mode)
    }

    /// The stock kernel alone, which isolates its page tables from programs.
    pub(super) fn isolated(&self, mode: &str) -> Result<Run> {
        self.bare_with("pti=on ", mode)
    }

    fn bare_with(&self, words: &str, mode: &str) -> Result<Run> {
        let mut machine = self.machine("", Clock::Skips)?;
        let command = &mut machine.command;
        command.arg("-kernel").arg(&self.kernel.bzimage).arg("-initrd").arg(self.ramdisk.path());
        command.arg("-append").arg(format!("console=ttyS0 {WORDS} {words}-- {mode}"));
        machine.run(&self.name_of_run("bare", &format!("{words}{mode}")), wants(mode), &[], self.logs.as_deref())
    }

    /// The stock kernel as Xen's first domain.
    pub(super) fn xen(&self, form: Form, mode: &str, memory: u32) -> Result<Run> {
        let xen = self.xen.as_ref().context("Xen is not wanted, yet asked for")?;
        let mut machine = self.machine("", Clock::Skips)?;
        // Modules: the kernel with its command line, and its ramdisk.
        let mut modules = OsString::from(self.file(form));
        modules.push(format!(" console=hvc0 {WORDS} {}-- {mode},", self.words));
        modules.push(self.ramdisk.path());
        let command = &mut machine.command;
        command.arg("-kernel").arg(&xen.image).arg("-initrd").arg(modules);
        command.arg("-append").arg(format!("console=com1 com1=115200 dom0_mem={memory}M,max:{memory}M"));
        machine.run(&self.name_of_run("xen", &format!("{}{mode}", self.words)), wants(mode), &[], self.logs.as_deref())
    }

    /// The stock kernel as a guest of Tenon.
    pub(super) fn tenon(&self, form: Form, mode: &str, memory: u32) -> Result<Run> {
        let name = self.name_of_run("tenon", &format!("{}{mode}-{form:?}", self.words)).to_lowercase();
        self.guests(&name, &[self.linux(form, mode, memory)], wants(mode), &[])
    }

    /// The stock kernel on a hypervisor, as Xen's first domain or as a guest of Tenon.
    pub(super) fn hosted(&self, column: Column, form: Form, mode: &str, memory: u32) -> Result<Run> {
        match column {
            Column::Bare => bail!("the bare machine has no hypervisor"),
            Column::Xen => self.xen(form, mode, memory),
            Column::Tenon => self.tenon(form, mode, memory),
        }
    }

    /// A guest that runs the benchmark program.
    pub(super) fn linux(&self, form: Form, mode: &str, memory: u32) -> Guest {
        Guest {
            name: "linux".into(),
            memory,
            vcpus: 1,
            kernel: self.file(form).to_owned(),
            ramdisk: Some(self.ramdisk.path().to_owned()),
            extra: format!("console=hvc0 {WORDS} {}-- {mode}", self.words),
            vif: Vec::new(),
        }
    }

    /// Tenon with these guests. `wants` must appear on the console; `typed` goes to it.
    pub(super) fn guests(&self, name: &str, guests: &[Guest], wants: &str, typed: &[Typed<'_>]) -> Result<Run> {
        let bundle = guests.iter().fold(Bundle::dom0(&self.image("dom0")?, ""), |bundle, guest| bundle.guest(guest));
        self.bundle(name, &bundle, (&[], Clock::Skips), wants, typed)
    }

    /// A guest that reads from disks: one of the machine, and one in memory.
    pub(super) fn disks(&self, memory: u32) -> Result<Run> {
        let guest = self.linux(Form::Elf, mode::DISKS, memory);
        let mib = microbench::DISK_BYTES >> 20;
        let disks = [format!("serial:{SERIAL},,xvda,w"), format!("memory:{mib}M,,xvdb,w")];
        let config = GuestConfig {
            extra: guest.extra.clone(),
            disk: disks.iter().map(|text| text.parse()).collect::<Result<_, _>>().map_err(Error::msg)?,
            ..GuestConfig::new(&guest.name, memory.into(), "")
        };
        let bundle = Bundle::dom0(&self.image("dom0")?, "").with_guest(config, &guest.kernel, guest.ramdisk.as_deref());
        let file = NamedTempFile::new()?;
        file.as_file().set_len(microbench::DISK_BYTES)?;
        let arguments = disk(file.path(), "");
        self.bundle("tenon-disks", &bundle, (&arguments, Clock::Passes), wants(mode::DISKS), &[])
    }

    /// Two guests on a network: one serves, the other measures. The console of the first is shown.
    pub(super) fn network(&self, memory: u32) -> Result<Run> {
        let vif = || "bridge=bench".parse::<VifConfig>().map_err(Error::msg);
        let [serves, measures] =
            [("serves", mode::SERVE), ("measures", mode::NETWORK)].map(|(name, mode)| -> Result<_> {
                Ok(Guest { name: name.into(), vif: vec![vif()?], ..self.linux(Form::Elf, mode, memory) })
            });
        self.guests("tenon-network", &[measures?, serves?], wants(mode::NETWORK), &[])
    }

    /// A guest that exchanges bytes with the host by TCP, through dom0's gateway.
    pub(super) fn guest_and_host(&self, memory: u32, clock: Clock) -> Result<(Run, Times)> {
        let server = Server::start()?;
        let vif = format!("ip={}", Ipv4Addr::from(BEHIND_GATEWAY[0])).parse::<VifConfig>().map_err(Error::msg)?;
        let linux = self.linux(Form::Elf, &format!("{} {}", mode::HOST_GUEST, server.port()), memory);
        let bundle = Bundle::dom0(&self.image("dom0")?, "").guest(&Guest { vif: vec![vif], ..linux });
        let run = self.bundle(
            &format!("tenon-host{}", clock.ending()),
            &bundle,
            (&USER_NETWORK.map(Into::into), clock),
            wants(mode::HOST_GUEST),
            &[],
        )?;
        Ok((run, server.finish()?))
    }

    /// The stock kernel alone, which exchanges bytes with the host by TCP.
    pub(super) fn bare_and_host(&self, clock: Clock) -> Result<(Run, Times)> {
        let server = Server::start()?;
        let mut machine = self.machine("", clock)?;
        let command = machine.command.args(USER_NETWORK);
        command.arg("-kernel").arg(&self.kernel.bzimage).arg("-initrd").arg(self.ramdisk.path());
        command.arg("-append").arg(format!("console=ttyS0 panic=-1 -- {} {}", mode::HOST_ALONE, server.port()));
        let run =
            machine.run(&format!("bare-host{}", clock.ending()), wants(mode::HOST_ALONE), &[], self.logs.as_deref())?;
        Ok((run, server.finish()?))
    }

    /// Tenon with this bundle, more arguments for QEMU, and this clock.
    fn bundle(
        &self,
        name: &str,
        bundle: &Bundle,
        (more, clock): (&[String], Clock),
        wants: &str,
        typed: &[Typed<'_>],
    ) -> Result<Run> {
        let dom0 = self.image("dom0")?;
        let archive = bundle.write()?;
        let mut machine = self.machine(&format!(",dom0={}", text_of(&dom0)?), clock)?;
        let command = &mut machine.command;
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]).args(more);
        command.arg("-kernel").arg(self.image("hypervisor")?).arg("-initrd").arg(archive.path());
        machine.run(name, wants, typed, self.logs.as_deref())
    }

    fn file(&self, form: Form) -> &Path {
        match form {
            Form::BzImage => &self.kernel.bzimage,
            Form::Elf => &self.kernel.vmlinux,
        }
    }

    /// The machine of every column; `arguments` are more words for the plugin.
    fn machine(&self, arguments: &str, clock: Clock) -> Result<Machine> {
        let counts = NamedTempFile::new()?;
        let mut command = self.qemu.command();
        command.args(["-accel", "tcg", "-smp", "1", "-cpu", CPU]);
        command.args(["-m", &MACHINE.to_string(), "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"]);
        let clock = if self.counting { clock } else { Clock::IsHosts };
        let sleep = match clock {
            Clock::Skips => Some("off"),
            Clock::Passes => Some("on"),
            Clock::IsHosts => None,
        };
        if let Some(sleep) = sleep {
            let on = |wanted, what| if wanted { what } else { "" };
            let (profile, stays) = (on(self.profile, ",profile=on"), on(self.stays, ",stays=on"));
            let mut plugin = OsString::from("file=");
            plugin.push(&self.plugin);
            plugin.push(format!(",out={}{arguments}{profile}{stays}", counts.path().display()));
            command.arg("-icount").arg(format!("shift=0,sleep={sleep}")).arg("-plugin").arg(plugin);
        }
        Ok(Machine { command, counts, until: None })
    }
}

/// The drivers that a kernel alone on a machine loads for a virtio network device, by their paths in the initramfs.
fn of_virtio_net(sh: &Shell, kernel: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let folder = VIRTIO_NET_DRIVERS.to_str()?.trim_start_matches('/');
    let files = kernels::drivers_of_virtio_net(sh, kernel)?;
    ensure!(files.len() <= usize::from(MAX_DRIVERS), "{} drivers are too many", files.len());
    let named = ('a'..).zip(files).map(|(letter, file)| Ok((format!("{folder}{letter}.ko"), fs::read(file)?)));
    named.collect()
}

/// What the benchmark program prints when it has done what `mode` asks.
fn wants(mode: &str) -> &'static str {
    if matches!(mode, mode::BOOT | mode::WAIT) { REACHED } else { DONE }
}

/// The addresses of a program's text, as the plugin wants them.
fn text_of(file: &Path) -> Result<String> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let elf = object::File::parse(&*bytes).with_context(|| format!("{} is no program", file.display()))?;
    // PF_X
    let executable = |flags| matches!(flags, SegmentFlags::Elf { p_flags, .. } if p_flags.0 & 1 != 0);
    let text = elf.segments().find(|segment| executable(segment.flags()));
    let text = text.with_context(|| format!("{} has no text", file.display()))?;
    Ok(format!("{:x}-{:x}", text.address(), text.address() + text.size()))
}
