//! The emulated machine: how it is put together and what its end means.

use crate::disk::Disk;
use crate::qemu::{self, Qemu};
use hypercall_abi::sched::ShutdownReason;
use std::path::Path;
use std::process::{Command, ExitStatus};
use toolstack::forward::{Forward, Transport};

pub use toolstack::bundle::ANSWER;
pub use toolstack::status::Failure;

/// Where the machine's first serial line leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// To standard input and output as they are.
    Plain,
    /// To a terminal: Ctrl-C belongs to the guest, and Ctrl-A X ends the machine.
    Terminal,
}

/// What a machine is made of, whatever it boots. Besides, it has one serial line, and a device at port 0xf4 through which
/// the hypervisor ends it: see [`End`].
#[derive(Clone, Debug)]
pub struct Hardware {
    /// Memory in MiB.
    pub memory: u32,
    /// The model of its CPUs, as QEMU calls it; `None` for the one with most features.
    pub cpu: Option<String>,
    /// Arguments for QEMU that stand behind our own.
    pub arguments: Vec<String>,
    /// Its disks; they are numbered from 0 on.
    pub disks: Vec<Disk>,
    /// Its network device; `None` if it has none.
    pub network: Option<Network>,
    /// Where its serial line leads.
    pub console: Console,
}

/// What the machine's network device is connected to: QEMU's user network, behind this machine's own addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Ports of this machine, at the address 127.0.0.1, that lead to the same ports of the emulated machine.
    pub forwards: Vec<Forward>,
}

impl Network {
    /// The options of QEMU.
    fn arguments(&self) -> [String; 4] {
        let forward = |forward: &Forward| {
            let protocol = match forward.transport {
                Transport::Tcp => "tcp",
                Transport::Udp => "udp",
            };
            format!(",hostfwd={protocol}:127.0.0.1:{0}-:{0}", forward.outer)
        };
        let forwards: String = self.forwards.iter().map(forward).collect();
        // The device's ROM would boot from the network, and not every QEMU has the file.
        let device = "virtio-net-pci,netdev=net0,romfile=".to_owned();
        ["-netdev".into(), format!("user,id=net0{forwards}"), "-device".into(), device]
    }
}

impl Hardware {
    /// A machine of so many MiB, with nothing special.
    #[must_use]
    pub const fn new(memory: u32, console: Console) -> Self {
        Self { memory, cpu: None, arguments: Vec::new(), disks: Vec::new(), network: None, console }
    }

    /// A command that boots `hypervisor` (an ELF file) with the archive `bundle`. `options` is the hypervisor's own
    /// command line.
    #[must_use]
    pub fn boot(&self, qemu: &Qemu, hypervisor: &Path, bundle: &Path, options: &str) -> Command {
        let mut command = self.empty(qemu);
        command.arg("-kernel").arg(hypervisor).arg("-initrd").arg(bundle).arg("-append").arg(options);
        command.args(&self.arguments);
        command
    }

    /// A command that lets the machine's own firmware boot `iso`: BIOS, or the UEFI firmware in the file `uefi`.
    #[must_use]
    pub fn boot_image(&self, qemu: &Qemu, iso: &Path, medium: Medium, uefi: Option<&Path>) -> Command {
        let mut command = self.empty(qemu);
        if let Some(firmware) = uefi {
            command.arg("-bios").arg(firmware);
        }
        // A comma in an option's value is written twice.
        let file = iso.as_os_str().to_string_lossy().replace(',', ",,");
        if medium == Medium::Cd && !self.disks.is_empty() {
            // The firmware would look at the disks first.
            command.args(["-boot", "d"]);
        }
        command.arg("-drive").arg(match medium {
            Medium::Cd => format!("media=cdrom,readonly=on,format=raw,file={file}"),
            Medium::Disk => format!("media=disk,snapshot=on,format=raw,file={file}"),
        });
        command.args(&self.arguments);
        command
    }

    /// The machine with nothing to boot.
    fn empty(&self, qemu: &Qemu) -> Command {
        let mut command = qemu.command();
        let (accelerator, model) = qemu::accelerator();
        command.args(["-accel", accelerator, "-cpu", self.cpu.as_deref().unwrap_or(model)]);
        command.args(["-m", &self.memory.to_string(), "-nodefaults", "-display", "none", "-no-reboot"]);
        command.arg("-chardev").arg(match self.console {
            Console::Plain => "stdio,id=com1",
            Console::Terminal => "stdio,id=com1,mux=on,signal=off",
        });
        command.args(["-serial", "chardev:com1", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        command.args(self.disks.iter().enumerate().flat_map(|(number, disk)| disk.arguments(number)));
        command.args(self.network.iter().flat_map(Network::arguments));
        command
    }
}

/// How an image made by [`crate::grub`] is put into a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A CD in its drive.
    Cd,
    /// A disk, as on a stick.
    Disk,
}

/// Why a machine ended. Writing `v` to port 0xf4 ends QEMU with the status `2v + 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The hypervisor wrote 0x10: everything that was asked for went well.
    Success,
    /// The hypervisor wrote 0x11: it panicked, or found nothing to start.
    Panic,
    /// The hypervisor wrote 0x20 and more: the first domain ended for this reason, which was not a good one.
    First(u32),
    /// The machine was reset or switched off without a word from the hypervisor.
    Reset,
    /// QEMU itself refused to start or gave up.
    Emulator,
    /// The hypervisor wrote another value, or QEMU was killed by a signal (`None`).
    Other(Option<i32>),
}

impl End {
    /// The meaning of QEMU's exit status.
    #[must_use]
    pub fn of(status: ExitStatus) -> Self {
        match status.code() {
            Some(33) => Self::Success,
            Some(35) => Self::Panic,
            Some(code @ 65..=127) if code % 2 == 1 => Self::First(u32::try_from(code / 2).unwrap_or(0) & 0x1f),
            Some(0) => Self::Reset,
            Some(1) => Self::Emulator,
            other => Self::Other(other),
        }
    }

    /// One line for the user.
    #[must_use]
    pub fn explanation(self) -> String {
        match self {
            Self::Success => "the machine ended in good order".into(),
            Self::Panic => "the hypervisor panicked, or had nothing to start: see the console above".into(),
            Self::First(reason) => match ShutdownReason::from_number(u64::from(reason)) {
                Some(ShutdownReason::Crash) => "the first domain crashed: see the console above".into(),
                Some(reason) => format!("the first domain ended: {}", reason.name().to_lowercase()),
                None => format!("the first domain ended for the reason {reason}"),
            },
            Self::Reset => "the machine was reset without a word from the hypervisor (a triple fault?)".into(),
            Self::Emulator => "QEMU could not run the machine: see its message above".into(),
            Self::Other(Some(code)) => format!("the machine ended with the unknown status {code}"),
            Self::Other(None) => "QEMU was killed".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_cpu_model_and_more_arguments_reach_qemu() {
        let qemu = Qemu::at("qemu".into());
        let words = |command: Command| -> Vec<String> {
            command.get_args().map(|word| word.to_string_lossy().into_owned()).collect()
        };
        let plain = Hardware::new(64, Console::Plain);
        let arguments = vec!["-smp".into(), "2".into()];
        let other = Hardware { cpu: Some("Nehalem,-sse4.2".into()), arguments, ..plain.clone() };
        let (file, boots) =
            (Path::new("a"), |hardware: &Hardware| words(hardware.boot(&qemu, Path::new("a"), Path::new("b"), "")));
        let model = |words: &[String]| words.windows(2).find(|two| two[0] == "-cpu").map(|two| two[1].clone());
        assert_eq!(model(&boots(&plain)).as_deref(), Some(qemu::accelerator().1));
        for words in [boots(&other), words(other.boot_image(&qemu, file, Medium::Cd, None))] {
            assert_eq!(model(&words).as_deref(), Some("Nehalem,-sse4.2"));
            assert!(words.ends_with(&["-smp".into(), "2".into()]), "{words:?}");
        }
    }

    #[test]
    fn ports_of_the_host_lead_to_the_machine() {
        let forwards = ["2222:web:22", "udp:53:dns:5353"].map(|text| text.parse().unwrap()).to_vec();
        let hardware = Hardware { network: Some(Network { forwards }), ..Hardware::new(64, Console::Plain) };
        let command = hardware.boot(&Qemu::at("qemu".into()), Path::new("a"), Path::new("b"), "");
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        let at = words.iter().position(|word| word == "-netdev").unwrap();
        assert_eq!(words[at + 1], "user,id=net0,hostfwd=tcp:127.0.0.1:2222-:2222,hostfwd=udp:127.0.0.1:53-:53");
        assert_eq!(words[at + 3], "virtio-net-pci,netdev=net0,romfile=");
    }

    #[test]
    fn every_status_has_its_meaning() {
        let exited = |code: i32| End::of(ExitStatus::from_raw(code << 8));
        assert_eq!(exited(33), End::Success);
        assert_eq!(exited(35), End::Panic);
        assert_eq!(exited(2 * (0x20 + 3) + 1), End::First(3));
        assert_eq!(exited(2 * (0x20 + 21) + 1), End::First(21));
        assert_eq!(exited(66), End::Other(Some(66)));
        assert_eq!(exited(0), End::Reset);
        assert_eq!(exited(1), End::Emulator);
        assert_eq!(exited(5), End::Other(Some(5)));
        assert_eq!(End::of(ExitStatus::from_raw(9)), End::Other(None));
    }
}
