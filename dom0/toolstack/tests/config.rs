//! What a configuration may say, and how it is told that it may not.
#![forbid(unsafe_code)]

use toolstack::config::{Action, GuestConfig};
use toolstack::disk::Target;

const GOOD: &str = "# a guest\nname = \"web\"\nmemory = 256\nkernel = \"vmlinuz\"\n";

fn refusal(text: &str) -> String {
    GuestConfig::parse(text).unwrap_err().to_string()
}

fn and(more: &str) -> String {
    refusal(&format!("{GOOD}{more}\n"))
}

#[test]
fn what_is_not_said_has_a_default() {
    let config = GuestConfig::parse(GOOD).unwrap();
    assert_eq!((config.name.as_str(), config.memory, config.kernel.as_str()), ("web", 256, "vmlinuz"));
    assert_eq!((config.vcpus, config.ramdisk, config.extra.as_str()), (1, None, ""));
    let actions = (config.on_poweroff, config.on_reboot, config.on_crash);
    assert_eq!(actions, (Action::Destroy, Action::Restart, Action::Destroy));
}

#[test]
fn everything_can_be_said() {
    let text = format!(
        "{GOOD}vcpus = 4\nramdisk = 'initrd.img'\nextra = 'console=hvc0 root=/dev/xvda'\non_poweroff = 'preserve'\n\
         on_reboot = \"destroy\"\non_crash = 'restart'\n"
    );
    let config = GuestConfig::parse(&text).unwrap();
    assert_eq!((config.vcpus, config.ramdisk.as_deref()), (4, Some("initrd.img")));
    assert_eq!(config.extra, "console=hvc0 root=/dev/xvda");
    let actions = (config.on_poweroff, config.on_reboot, config.on_crash);
    assert_eq!(actions, (Action::Preserve, Action::Destroy, Action::Restart));
}

#[test]
fn errors_name_the_line_and_the_key() {
    assert!(and("colour = 'red'").starts_with("line 5: colour: unknown field `colour`, expected one of"));
    assert!(and("vcpus = 'two'").starts_with("line 5: vcpus: invalid type"), "{}", and("vcpus = 'two'"));
    assert_eq!(and("vcpus = 0"), "line 5: vcpus: 1 to 32 vcpus");
    assert_eq!(and("vcpus = 33"), "line 5: vcpus: 1 to 32 vcpus");
    assert!(and("on_crash = 'dance'").starts_with("line 5: on_crash: unknown variant `dance`"));
    assert!(and("memory = 512").starts_with("line 5: memory: duplicate key"), "{}", and("memory = 512"));
    assert_eq!(and("\nramdisk = ''"), "line 6: ramdisk: the name of a file");
    assert_eq!(and(&format!("extra = '{}'", "x".repeat(1024))), "line 5: extra: at most 1023 bytes without a NUL");
    assert_eq!(and("extra = \"a\\u0000b\""), "line 5: extra: at most 1023 bytes without a NUL");
    assert!(and("vcpus =").starts_with("line 5: vcpus: "), "{}", and("vcpus ="));
    assert!(and("nonsense").starts_with("line 5: "), "{}", and("nonsense"));
    assert_eq!(refusal("name = 'a'\nmemory = 0\nkernel = 'k'"), "line 2: memory: a number of MiB from 1 on");
    assert!(refusal("name = 'a'\nmemory = -1\nkernel = 'k'").starts_with("line 2: memory: "));
}

/// Whatever a configuration says, it reads what it wrote; and what is not said is written, or stays unsaid.
#[test]
fn a_configuration_reads_what_it_wrote() {
    let actions = [Action::Destroy, Action::Restart, Action::Preserve];
    let extras = ["", "console=hvc0", "a\tb \"c\\ 'd' ä\u{7f}\u{1}\n#=[]", "'''\"\"\"", &"x".repeat(1023)];
    let file = "vdev=xvdaa,format=qcow2,target=/a, \"b'=c.img";
    let disks = [file, "serial:x,,xvda,part=2,overlay=1M", "bundle:b,,xvdb", "memory:1M,,xvdc,!"];
    for (n, extra) in extras.iter().enumerate() {
        let config = GuestConfig {
            maxmem: 1 << 30,
            vcpus: 32,
            ramdisk: (n % 2 == 0).then(|| "boot/initrd \"new\"".into()),
            extra: (*extra).into(),
            on_poweroff: actions[n % 3],
            on_reboot: actions[(n + 1) % 3],
            on_crash: actions[(n + 2) % 3],
            on_watchdog: actions.get(n).copied(),
            disk: disks.iter().take(n).map(|disk| disk.parse().unwrap()).collect(),
            vif: ["", "bridge=lan,ip=10.0.0.9"].iter().take(n).map(|vif| vif.parse().unwrap()).collect(),
            ..GuestConfig::new("web-1.x", 64, "vmlinuz")
        };
        let text = config.to_toml();
        assert_eq!(GuestConfig::parse(&text).as_ref(), Ok(&config), "{text}");
        assert_eq!(text.contains("on_watchdog"), config.on_watchdog.is_some());
    }
    assert_eq!(GuestConfig::parse(GOOD), Ok(GuestConfig::new("web", 256, "vmlinuz")));
}

/// A guest is spoken of on dom0's command line: its name is no number, no option and not the first domain's.
#[test]
fn names_can_be_typed() {
    let named = |name: &str| GuestConfig::parse(&GOOD.replace("web", name)).map_err(|why| why.to_string());
    for good in ["a", "a-j", "_j", ".", "1a", "domain-0", &"x".repeat(64)] {
        assert_eq!(named(good).map(|config| config.name).as_deref(), Ok(good));
    }
    for bad in ["", "a b", "12", "-j", "-", "--help", "ä", "a;b", "a/b", &"x".repeat(65)] {
        let why = named(bad).unwrap_err();
        assert!(why.starts_with("line 2: name: 1 to 64 letters, digits"), "{bad:?}: {why}");
    }
    for first in ["dom0", "Domain-0"] {
        assert_eq!(named(first).unwrap_err(), "line 2: name: this is the name of the first domain");
    }
}

#[test]
fn memory_may_grow_but_not_below_what_it_is() {
    assert_eq!(GuestConfig::parse(GOOD).unwrap().maxmem, 256);
    assert_eq!(GuestConfig::parse(&format!("{GOOD}maxmem = 512\n")).unwrap().maxmem, 512);
    assert_eq!(and("maxmem = 0"), "line 5: maxmem: a number of MiB, and not less than `memory`");
    assert_eq!(and("\nmaxmem = 255"), "line 6: maxmem: a number of MiB, and not less than `memory`");
    assert_eq!(and("maxmem = 255"), "line 5: maxmem: a number of MiB, and not less than `memory`");
}

#[test]
fn network_devices_are_read_in_their_order() {
    assert_eq!(GuestConfig::parse(GOOD).unwrap().vif, []);
    let config = GuestConfig::parse(&format!("{GOOD}vif = ['', 'bridge=lan,mac=00:16:3e:00:00:01']\n")).unwrap();
    let names: Vec<&str> = config.vif.iter().map(|vif| vif.bridge.as_str()).collect();
    assert_eq!(names, ["nat", "lan"]);
    assert_eq!(GuestConfig::parse(&config.to_toml()), Ok(config));
}

#[test]
fn a_wrong_network_device_is_told_with_its_line() {
    assert!(and("\nvif = ''").starts_with("line 6: vif: invalid type"), "{}", and("\nvif = ''"));
    let script = "line 5: vif: vif 2: `script` is refused: dom0 runs no scripts; `bridge`, `ip` and `rate` say what one would set";
    assert_eq!(and("vif = ['', 'script=vif-route']"), script);
    let mac = "'mac=00:16:3e:00:00:01'";
    assert_eq!(and(&format!("vif = [{mac}, '', {mac}]")), "line 5: vif: two vifs have the address 00:16:3e:00:00:01");
    let many = "'',".repeat(9);
    assert_eq!(and(&format!("vif = [{many}]")), "line 5: vif: 9 vifs, and a guest has at most 8");
}

#[test]
fn disks_are_read_in_their_order() {
    assert_eq!(GuestConfig::parse(GOOD).unwrap().disk, []);
    let disks = "disk = [\n  'a b.img,raw,xvdb,r',  # a file of the host\n  'memory:16M,,xvda',\n]\n";
    let config = GuestConfig::parse(&format!("{GOOD}{disks}")).unwrap();
    let [file, memory] = &config.disk[..] else { panic!("two disks, not {:?}", config.disk) };
    assert_eq!((&file.target, file.vdev.name()), (&Target::File("a b.img".into()), "xvdb"));
    assert_eq!((&memory.target, memory.vdev.name()), (&Target::Memory(16 << 20), "xvda"));
    assert_eq!(GuestConfig::parse(&config.to_toml()), Ok(config));
}

#[test]
fn a_wrong_disk_is_told_with_its_line() {
    let old = "line 5: disk: disk 1: `phy:` is xl's old form: give the path alone, and the format as `format`";
    assert_eq!(and("disk = ['phy:/dev/x,,xvda,w']"), old);
    let list = |disks: &str| and(&format!("disk = [\n  'a,,xvda',\n  {disks},\n]"));
    assert_eq!(
        list("'a,,sda'"),
        "line 5: disk: disk 2: a vdev is xvda to xvdzz, with a partition from 1 to 15 perhaps"
    );
    assert_eq!(list("\"vdev=xvdb,target=\""), "line 5: disk: disk 2: `target` is missing");
    assert_eq!(list("'b,,xvdb', 'c,,xvda'"), "line 5: disk: two disks are named xvda");
    let many: Vec<String> = (b'a'..=b'q').map(|disk| format!("'memory:1M,,xvd{}'", char::from(disk))).collect();
    assert_eq!(and(&format!("disk = [{}]", many.join(","))), "line 5: disk: 17 disks, and a guest has at most 16");
    assert!(GuestConfig::parse(&format!("{GOOD}disk = [{}]", many[1..].join(","))).is_ok());
    assert!(and("disk = 'a,,xvda'").starts_with("line 5: disk: invalid type"), "{}", and("disk = 'a,,xvda'"));
}

#[test]
fn a_missing_key_is_named() {
    assert_eq!(refusal(""), "missing field `name`");
    assert_eq!(refusal("name = 'a'\nmemory = 4\n"), "missing field `kernel`");
}

#[test]
fn damaged_text_never_panics() {
    let text = format!("{GOOD}vcpus = 4\nextra = \"ä\\u00e4 [a.b]\"\non_crash = 'restart'\n");
    for cut in 0..text.len() {
        for byte in [b'"', b'=', b'[', b'\n', 0xff, 0] {
            let mut damaged = text.clone().into_bytes();
            damaged[cut] = byte;
            let damaged = String::from_utf8_lossy(&damaged);
            if let Err(error) = GuestConfig::parse(&damaged) {
                assert!(!error.to_string().is_empty());
            }
        }
        let _ = text.get(..cut).map(GuestConfig::parse);
    }
}

#[test]
fn a_text_longer_than_any_configuration_is_refused() {
    let text = |comment: usize| format!("name = 'web'\nmemory = 64\nkernel = 'k'\n#{}", "x".repeat(comment));
    assert!(GuestConfig::parse(&text(60 << 10)).is_ok());
    let long = text(1 << 20);
    let refusal = GuestConfig::parse(&long).unwrap_err().to_string();
    assert_eq!(refusal, format!("{} bytes, and a configuration has at most 65536", long.len()));
}
