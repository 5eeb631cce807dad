//! Who may do what (ABI io 3.5), as a matrix, and what is left of dead domains.

mod common;
use common::*;

/// Letters of the default and of the exception, and whether a stranger / the named domain may
/// read and write.
#[test]
fn every_letter_grants_what_it_says_to_whom_it_says() {
    let letters = [('n', false, false), ('r', true, false), ('w', false, true), ('b', true, true)];
    for (default, default_read, default_write) in letters {
        for (named, named_read, named_write) in letters {
            let mut world = World::new(&[4, 5, 6]);
            let mut session = world.store.session(world.dom0);
            session.write("/x", b"v").unwrap();
            session.set_permissions("/x", &format!("{default}4,{named}5")).unwrap();
            let rights = [(4, true, true), (5, named_read, named_write), (6, default_read, default_write)];
            for (domain, read, write) in rights {
                let guest = World::guest(domain);
                let label = format!("{default}4,{named}5 for {domain}");
                let may_read = |reply: Reply| match reply {
                    Ok(_) => true,
                    Err(name) if name == "EACCES" => false,
                    Err(name) => panic!("{label}: {name}"),
                };
                assert_eq!(may_read(world.ask(guest, READ, "/x|")), read, "{label}");
                assert_eq!(may_read(world.ask(guest, DIRECTORY, "/x|")), read, "{label}");
                assert_eq!(may_read(world.ask(guest, GET_PERMS, "/x|")), read, "{label}");
                assert_eq!(may_read(world.ask(guest, DIRECTORY_PART, "/x|0|")), read, "{label}");
                assert_eq!(may_read(world.ask(guest, MKDIR, "/x|")), write, "{label}");
                assert_eq!(may_read(world.ask(guest, WRITE, "/x|new")), write, "{label}");
                assert_eq!(may_read(world.ask(guest, WRITE, "/x/child|1")), write, "{label}");
                let owns = domain == 4;
                let list = format!("/x|{default}4|{named}5|");
                assert_eq!(may_read(world.ask(guest, SET_PERMS, &list)), owns, "{label}");
                assert_eq!(may_read(world.ask(guest, RM, "/x/none|")), write, "{label}");
                if domain == 6 {
                    assert_eq!(may_read(world.ask(guest, RM, "/x|")), write, "{label}");
                }
            }
        }
    }
}

#[test]
fn absence_is_a_secret_where_reading_is_not_allowed() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let mut session = world.store.session(world.dom0);
    session.write("/secret/a", b"").unwrap();
    session.write("/open", b"").unwrap();
    session.set_permissions("/open", "r0").unwrap();
    for path in ["/secret/a|", "/secret/b|", "/secret/b/c|", "/none|"] {
        assert_eq!(world.ask(guest, READ, path), refused("EACCES"), "{path}");
    }
    assert_eq!(world.ask(guest, READ, "/open/none/deep|"), refused("ENOENT"));
    assert_eq!(world.ask(guest, WRITE, "/open/none|1"), refused("EACCES"));
    assert_eq!(world.ask(guest, RM, "/open/none|"), refused("EACCES"));
    assert_eq!(world.ask(guest, RM, "/|"), refused("EINVAL"));
    assert_eq!(world.ask(guest, READ, "/|"), refused("EACCES"), "the root is private (XSA-353)");
    assert_eq!(world.ask(guest, WRITE, "/|x"), refused("EACCES"));
}

#[test]
fn what_a_guest_creates_it_owns() {
    let mut world = World::new(&[5, 6]);
    let (five, six) = (World::guest(5), World::guest(6));
    world.store.session(world.dom0).mkdir("/shared").unwrap();
    world.store.session(world.dom0).set_permissions("/shared", "n0,b5,b6").unwrap();
    world.ask(five, WRITE, "/shared/a/b|1").unwrap();
    assert_eq!(world.ask(five, GET_PERMS, "/shared/a/b|"), value("n5|b5|b6|"));
    assert_eq!(world.ask(six, GET_PERMS, "/shared/a|"), value("n5|b5|b6|"));
    assert_eq!(world.store.usage(store::DomainId(5)).nodes, 2 + 2);
    world.store.session(world.dom0).write("/local/domain/5/data/x", b"").unwrap();
    assert_eq!(world.ask(five, GET_PERMS, "data/x|"), value("n5|r0|"), "dom0's gift is the guest's");
    assert_eq!(world.ask(six, SET_PERMS, "/shared/a|n5|b6|"), refused("EACCES"));
    assert_eq!(world.ask(five, SET_PERMS, "/shared/a|n6|"), refused("EPERM"), "XSA-352");
}

#[test]
fn the_device_directories_work_for_both_sides() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    let front = "/local/domain/5/device/vbd/51712";
    let back = "/local/domain/0/backend/vbd/5/51712";
    let created = world.store.session(world.dom0).transaction(|t| {
        for (path, list) in [(front, "n5,r0"), (back, "n0,r5")] {
            t.mkdir(path)?;
            t.set_permissions(path, list)?;
            t.write(&format!("{path}/state"), b"1")?;
        }
        t.write(&format!("{front}/mtu"), b"1500")?;
        t.set_permissions(&format!("{front}/mtu"), "n0,r5")
    });
    created.unwrap();
    assert_eq!(world.ask(guest, WRITE, "device/vbd/51712/state|3"), ok());
    assert_eq!(world.ask(guest, WRITE, "device/vbd/51712/queue-0/ring-ref|8"), ok());
    assert_eq!(world.ask(guest, WRITE, "device/vbd/51712/mtu|9000"), refused("EACCES"));
    assert_eq!(world.ask(guest, READ, &format!("{back}/state|")), value("1"));
    assert_eq!(world.ask(guest, WRITE, &format!("{back}/state|4")), refused("EACCES"));
    world.store.session(world.dom0).write(&format!("{back}/sectors"), b"8").unwrap();
    assert_eq!(world.ask(guest, READ, &format!("{back}/sectors|")), value("8"), "inherited");
}

#[test]
fn a_released_domain_leaves_nothing_to_its_successor() {
    let mut world = World::new(&[5, 6]);
    let (five, six) = (World::guest(5), World::guest(6));
    let nodes = world.store.tree().len();
    world.ask(five, WRITE, "data/secret/deep|5").unwrap();
    world.ask(six, SET_PERMS, "data|n6|r5|").unwrap();
    world.store.session(world.dom0).write("/tool/for-five", b"x").unwrap();
    world.store.session(world.dom0).set_permissions("/tool/for-five", "n0,r5").unwrap();
    world.store.session(world.dom0).set_permissions("@releaseDomain", "n5").unwrap();
    world.store.session(world.dom0).release(store::DomainId(5)).unwrap();
    assert_eq!(world.store.usage(store::DomainId(5)), store::tree::Usage::default());
    assert_eq!(world.ask(six, GET_PERMS, "data|"), value("n6|"));
    assert_eq!(world.ask(world.dom0, GET_PERMS, "/tool/for-five|"), value("n0|"));
    assert_eq!(world.ask(world.dom0, GET_PERMS, "@releaseDomain|"), value("n0|"));
    assert_eq!(world.ask(world.dom0, GET_PERMS, "/local/domain/5|"), value("n0|"));
    world.store.session(world.dom0).remove("/local/domain/5").unwrap();
    world.store.session(world.dom0).remove("/tool").unwrap();
    assert_eq!(world.store.tree().len(), nodes - 3, "home, data, device");
    world.introduce(5);
    assert_eq!(world.ask(five, READ, "data/secret/deep|"), refused("ENOENT"));
    assert_eq!(world.ask(five, READ, "/local/domain/6/data|"), refused("EACCES"));
}

#[test]
fn rights_for_domains_yet_to_come_are_not_kept() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    assert_eq!(world.ask(guest, SET_PERMS, "data|n5|b9|r0|"), ok());
    assert_eq!(world.ask(guest, GET_PERMS, "data|"), value("n5|r0|"));
    world.introduce(9);
    assert_eq!(world.ask(World::guest(9), READ, "/local/domain/5/data|"), refused("EACCES"));
    let mut session = world.store.session(world.dom0);
    session.mkdir("/prepared").unwrap();
    session.set_permissions("/prepared", "n0,r10").unwrap();
    world.introduce(10);
    assert_eq!(world.ask(World::guest(10), READ, "/prepared|"), value(""), "the toolstack may");
}

#[test]
fn a_target_lends_its_rights_until_it_is_gone() {
    let mut world = World::new(&[5, 6]);
    let helper = World::guest(6);
    assert_eq!(world.ask(helper, WRITE, "/local/domain/5/data/x|"), refused("EACCES"));
    assert_eq!(world.ask(world.dom0, SET_TARGET, "6|9|"), refused("ENOENT"));
    assert_eq!(world.ask(world.dom0, SET_TARGET, "9|5|"), refused("ENOENT"));
    assert_eq!(world.ask(world.dom0, SET_TARGET, "6|5|"), ok());
    assert_eq!(world.ask(helper, WRITE, "/local/domain/5/data/x|"), ok());
    assert_eq!(world.ask(world.dom0, RELEASE, "5|"), ok());
    world.introduce(5);
    assert_eq!(world.ask(helper, WRITE, "/local/domain/5/data/x|"), refused("EACCES"));
}

#[test]
fn a_special_name_has_permissions_too() {
    let mut world = World::new(&[5]);
    let guest = World::guest(5);
    assert_eq!(world.ask(world.dom0, GET_PERMS, "@releaseDomain|"), value("n0|"));
    assert_eq!(world.ask(guest, SET_PERMS, "@releaseDomain|r5|"), refused("EACCES"));
    assert_eq!(world.ask(world.dom0, SET_PERMS, "@releaseDomain|n0|r5|"), ok());
    assert_eq!(world.ask(guest, GET_PERMS, "@releaseDomain|"), value("n0|r5|"));
    assert_eq!(world.ask(world.dom0, SET_PERMS, "@other|n0|"), refused("ENOENT"));
}
